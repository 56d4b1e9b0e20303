"""A small model, and an exported file run by hand."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from localvit.data.preprocessing import Preprocessing
from localvit.models.factory import create_model

NAMES = ["ant", "bee", "crow, black", "dünn", "emu"]
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.7, 1.1)
PREPROCESSING = Preprocessing(input_size=(24, 24), crop_pct=0.8, mean=MEAN, std=STD)
TINY = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5, "reduction": 8}


def tiny_model() -> nn.Module:
    """A LocalViT of two blocks, with batch norms that are not the identity."""
    torch.manual_seed(7)
    model = create_model("localvit_tiny", **TINY)
    nn.init.normal_(model.head.weight, std=0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def linear_model() -> nn.Module:
    """One layer, for claims about an export that do not depend on the model."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, len(NAMES))).eval()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random pixels."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def run(path: Path, images: np.ndarray) -> np.ndarray:
    """The output of an ONNX file, with nothing of this package."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    [images_input] = session.get_inputs()
    [output] = session.run(None, {images_input.name: images})
    return output


def expected_probabilities(images: np.ndarray) -> np.ndarray:
    """By hand: scaled, normalized, through the model, and its softmax in float64."""
    x = images / 255
    x = (x - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    with torch.inference_mode():
        logits = tiny_model()(torch.from_numpy(x).float()).double().numpy()
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)
