"""Flags that take arguments of a function, as NAME=VALUE texts."""

from collections.abc import Sequence
from typing import Any

import yaml


def named_values(flag: str, texts: Sequence[str]) -> dict[str, Any]:
    """The values of the `name=value` texts of a flag, each read as YAML. Raises ValueError for another text."""
    pairs = [text.partition("=") for text in texts]
    for text, (name, equals, _) in zip(texts, pairs, strict=True):
        if not (name and equals):
            raise ValueError(f"{flag} {text} must be NAME=VALUE, such as depthwise=false")
    return {name: yaml.safe_load(value) for name, _, value in pairs}
