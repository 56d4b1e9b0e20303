"""The options of `localize` in the configuration of a Hugging Face model, which `save_pretrained` writes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from localvit.utils.plain_values import plain

ENTRY = "localvit"
"""Entry of the configuration."""


def record_in_config(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Write the options into the configuration of a model of transformers; do nothing to any other model."""
    if (config := _config_of(model)) is not None:
        setattr(config, ENTRY, {"localize": plain(options)})


def remove_from_config(model: nn.Module) -> None:
    """Undo `record_in_config`."""
    if (config := _config_of(model)) is not None and hasattr(config, ENTRY):
        delattr(config, ENTRY)


def _config_of(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config if hasattr(model, "save_pretrained") and hasattr(config, "to_diff_dict") else None
