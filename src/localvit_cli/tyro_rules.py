"""How `tyro` reads and shows flags: NAME=VALUE arguments, settings that are validated later, optional values."""

from collections.abc import Sequence
from typing import Any, get_type_hints

import tyro
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


def optional(metavar: str, default: str = "") -> Any:
    """How the help shows a flag whose default is None or empty: the name of its value, and what the default means."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else "")


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
    settings: type[BaseModel] = info.type
    types = get_type_hints(settings, include_extras=True)

    def construct(**values: Any) -> BaseModel:
        return settings.model_construct(**values)

    construct.__doc__ = settings.__doc__  # tyro shows it as the description of the group
    return StructConstructorSpec(
        instantiate=construct,
        fields=tuple(
            StructFieldSpec(
                name=name,
                type=types[name],
                default=getattr(info.default, name, field.default),
                helptext=" ".join((field.description or "").split()),
            )
            for name, field in settings.model_fields.items()
        ),
    )
