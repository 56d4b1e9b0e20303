"""How `tyro` reads the flags of training: NAME=VALUE arguments, and settings that are validated later."""

from collections.abc import Sequence
from typing import Any, get_type_hints

import yaml
from pydantic import BaseModel
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

REGISTRY = ConstructorRegistry()
"""The rules below, for `tyro.cli(..., registry=REGISTRY)`."""


@REGISTRY.primitive_rule
def _named_values_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Read dictionaries from NAME=VALUE arguments, such as --model-args depthwise=false."""
    if info.type not in (dict[str, Any], dict[str, Any] | None):
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME=VALUE ...]",
        instance_from_str=named_values,
        is_instance=lambda value: value is None or isinstance(value, dict),
        str_from_instance=lambda values: [f"{name}={value}" for name, value in (values or {}).items()] or ["none"],
    )


def named_values(texts: Sequence[str]) -> dict[str, Any]:
    """The values of NAME=VALUE texts by name, each read as YAML. Raises ValueError for any other text."""
    pairs = [text.partition("=") for text in texts]
    for text, (name, equals, _) in zip(texts, pairs, strict=True):
        if not (name and equals):
            raise ValueError(f"{text} must be NAME=VALUE, such as depthwise=false")
    return {name: yaml.safe_load(value) for name, _, value in pairs}


@REGISTRY.struct_rule
def _settings_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Do not validate pydantic models here: `TrainConfig` validates all settings at once, with shorter messages."""
    if not (isinstance(info.type, type) and issubclass(info.type, BaseModel)):
        return None
    types = get_type_hints(info.type, include_extras=True)
    return StructConstructorSpec(
        instantiate=info.type.model_construct,
        fields=tuple(
            StructFieldSpec(
                name=name,
                type=types[name],
                default=getattr(info.default, name, field.default),
                helptext=" ".join((field.description or "").split()),
            )
            for name, field in info.type.model_fields.items()
        ),
    )
