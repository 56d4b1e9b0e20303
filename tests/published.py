"""Results of the published program, and data outside the repository that may be missing."""

import json
from pathlib import Path

import numpy as np
import torch
import weights

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"


def golden_model(name: str) -> dict:
    """What the published program computed for a model, as `tests/golden` has it."""
    return json.loads((GOLDEN / "models" / f"{name}.json").read_text())


def published_state(name: str) -> dict[str, torch.Tensor]:
    """The stand-in weights of a model under the published names, in float32."""
    state = {}
    for key, shape, _ in golden_model(name)["state_dict"]:
        if not key.endswith(("relative_position_index", "attn_mask")):
            state[key] = torch.from_numpy(np.asarray(weights.tensor(key, tuple(shape))))
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
