"""Drawn images, and a small model that finds several classes among them."""

from pathlib import Path

import numpy as np
import torch
from exported_files import NAMES, PREPROCESSING, tiny_model
from PIL import Image
from torch import Tensor, nn

from localvit.exporters.proof import drawn_images


def drawn(count: int) -> np.ndarray:
    """As large as the small model resizes images, so that only the crop changes them."""
    return drawn_images(count, 30, 30)


def prepared(images: np.ndarray) -> Tensor:
    """As evaluation prepares them."""
    transform = PREPROCESSING.transform()
    return torch.stack([transform(Image.fromarray(image.transpose(1, 2, 0))) for image in images])


def balanced_model() -> nn.Module:
    """The small model with a head whose logits have the same mean and deviation for all classes on drawn images."""
    model = tiny_model()
    with torch.no_grad():
        logits = model(prepared(drawn(100)))
        std, mean = torch.std_mean(logits, 0)
        model.head.bias.copy_((model.head.bias - mean) / std)
        model.head.weight.div_(std[:, None])
    return model


def write_images(folder: Path, images: np.ndarray) -> Path:
    """Images (N, 3, H, W) as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number:04}.png", compress_level=1)
    return folder


def write_labeled(folder: Path, model: nn.Module, images: np.ndarray) -> Path:
    """The images, each in the folder of the class that the model finds."""
    with torch.inference_mode():
        classes = model(prepared(images)).argmax(1).numpy()
    for index, name in enumerate(NAMES):
        if (classes == index).any():
            write_images(folder / name, images[classes == index])
    return folder
