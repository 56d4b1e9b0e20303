"""The published program's numbers, and the shared data that a user's machine may lack."""

import json
from pathlib import Path

import numpy as np
import torch
import weights

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"


def golden_model(name: str) -> dict:
    """The published program's fixture of a model."""
    return json.loads((GOLDEN / "models" / f"{name}.json").read_text())


def published_state(name: str) -> dict[str, torch.Tensor]:
    """The stand-in weights of a model under the published names, float32."""
    state = {}
    for key, shape, _ in golden_model(name)["state_dict"]:
        if not key.endswith(("relative_position_index", "attn_mask")):
            state[key] = torch.from_numpy(np.asarray(weights.tensor(key, tuple(shape))))
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
