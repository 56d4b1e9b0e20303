"""`localvit push`: a trained model on the Hugging Face Hub."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from localvit.checkpoints.hub_download import check_name
from localvit.hub import push, save_hub_folder
from localvit.inference.runner import is_checkpoint_path, load_model
from localvit_cli import UsageError
from localvit_cli.tyro_rules import optional

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Push:
    """Share a trained model on the Hugging Face Hub, for timm and transformers too."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A checkpoint file."""
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="USER/NAME")]
    """The repository. It is created with the token of 'hf auth login' or HF_TOKEN."""
    weights: Literal["raw", "ema"] = "raw"
    """Share the raw or the averaged (EMA) weights of the checkpoint."""
    private: bool = False
    """Create a private repository."""
    update: bool = False
    """Add a commit to a repository that exists."""
    dry_run: Annotated[Path | None, optional("DIR")] = None
    """Write the files to this folder, and upload nothing."""

    def run(self) -> None:
        """Upload the model, or write its folder, and print where it is."""
        try:
            check_name(self.name)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if not is_checkpoint_path(self.model):
            raise UsageError(f"{self.model} is not a checkpoint file")
        loaded = load_model(self.model, weights=self.weights)
        logger.info(f"model: {loaded}")
        if self.dry_run is not None:
            print(save_hub_folder(loaded, self.dry_run, title=self.name))
        else:
            print(push(loaded, self.name, private=self.private, update=self.update))
