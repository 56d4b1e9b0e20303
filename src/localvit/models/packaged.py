"""Trained weights that this package contains, in the folder `weights/` beside this file.

docs/models.md is their model card. `benchmarks/release_weights.py` writes such a file.
"""

from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True, kw_only=True)
class PackagedWeights:
    """Weights of one model. Accuracies and loss are those of the packaged file, on the CPU in float32."""

    tag: str
    """timm's tag: what comes after the dot in `localvit_nano_patch4_32.cifar10`."""
    file: str
    """Name of the file in `weights/`."""
    class_names: tuple[str, ...]
    """Names of the classes in the model's order."""
    data_set: str
    """The data set, for a person."""
    num_images: int
    """Number of its test images, none of which was trained on."""
    acc1: float
    """Top-1 accuracy on these in percent."""
    acc5: float
    """Top-5 accuracy on these in percent."""
    loss: float
    """Loss on these in nats."""
    source: str
    """What to cite for the data."""

    @property
    def path(self) -> str:
        """Path of the installed file."""
        return str(resources.files("localvit.models").joinpath("weights", self.file))
