"""What a family of models states about itself: the contract between `localvit.models` and the rest of the package."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from localvit.models.published_names import to_own_names

PositionGrids = Mapping[str, tuple[tuple[int, int], int]]
"""For each position embedding (1, P + H * W, C) of a model, by name: its grid (H, W) and its prefix tokens P."""


class Family(nn.Module):
    """Base class of the published models, listed before timm's class if there is one.

    Each attribute and method has a default. A family overrides only what is different for it.
    """

    pretrained_cfg: dict[str, Any]
    """Set by timm when the model is made."""

    published_keys: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Pairs of a regular expression and its replacement that turn the name of a state-dict entry into the published
    program's name. The first pair that matches is used."""

    timm_cfg: ClassVar[Mapping[str, Any]] = {}
    """Fields of timm's pretrained configuration that depend on the architecture, such as `first_conv`."""

    out_indices: ClassVar[int | tuple[int, ...]] = 3
    """Default features of `timm.create_model(..., features_only=True)`: how many of the last, or which ones."""

    @classmethod
    def create(cls, **kwargs: Any) -> Self:
        """Make the model. Override it to choose between classes; its arguments are arguments of the model too."""
        return cls(**kwargs)

    def position_grids(self, img_size: tuple[int, int] | None = None) -> PositionGrids:
        """Grid and prefix tokens of each absolute position embedding, for images of `img_size` (height, width).

        Without `img_size`, those that the model has now. Raises ValueError if the patches do not divide the image.
        """
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """torch's `load_state_dict`, for the published names of the entries too.

        So `timm.create_model(name, checkpoint_path=...)` reads the published files and the raw weights of ours.
        `localvit.load_checkpoint` also fits position embeddings to another image size.
        """
        return super().load_state_dict(to_own_names(state_dict, self), strict=strict, assign=assign)

    def published_buffers(self) -> dict[str, Tensor]:
        """Entries of a published state dict that the model computes and does not store, by their published names."""
        return {}
