"""Weights in and out, in this package's layout and the published one: strict, and without running code from a file."""

from localvit.checkpoints.contents import Checkpoint, read_checkpoint
from localvit.checkpoints.loading import load_checkpoint, load_weights, model_from_checkpoint, weights_for
from localvit.checkpoints.mismatch import describe_mismatch, state_dict_mismatch
from localvit.checkpoints.saving import HEADER, img_size_of, make_header, save_checkpoint, versions
from localvit.utils.weight_files import CheckpointError

__all__ = [
    "HEADER",
    "Checkpoint",
    "CheckpointError",
    "describe_mismatch",
    "img_size_of",
    "load_checkpoint",
    "load_weights",
    "make_header",
    "model_from_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
    "state_dict_mismatch",
    "versions",
    "weights_for",
]
