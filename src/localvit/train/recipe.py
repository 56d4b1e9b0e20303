"""Settings from YAML files: the recipes of the package and a user's own files, and what is wrong with settings.

A file holds only the settings that differ from the defaults of `TrainConfig`.
"""

import difflib
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from localvit.train.config import TrainConfig

RECIPES = Path(__file__).parent / "recipes"
"""Folder of the recipes, `NAME.yaml` each."""


def recipe_names() -> list[str]:
    """Names of the recipes in the package, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe, for `TrainConfig(**settings)`. Raises ValueError for an unknown name."""
    if name not in recipe_names():
        raise ValueError(f"there is no recipe {name!r}; the recipes are {', '.join(recipe_names())}")
    return read_settings(RECIPES / f"{name}.yaml")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, for `TrainConfig(**settings)`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not a YAML mapping with names as keys.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ValueError(f"{path} must contain one setting per line, such as `epochs: 100`")
    return settings


def describe_errors(error: ValidationError, model: type[BaseModel] = TrainConfig) -> str:
    """One line per invalid setting: its name, its value and what is allowed.

    Args:
        error: from creating a `model` or one of its groups.
        model: the settings with their names and types.
    """
    return "\n".join(_describe(dict(each), model) for each in error.errors(include_url=False))


def _describe(error: dict[str, Any], model: type[BaseModel]) -> str:
    name, *indices = error["loc"] or (None,)
    value, message = error["input"], error["msg"].removeprefix("Value error, ")
    if name is None:
        return message
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, model.model_fields, n=1)
        return f"{name} is not a training setting" + (f"; did you mean {close[0]}?" if close else "")
    message = message.replace("Input should", "must").partition(" for <class")[0]
    if error["type"].endswith("_type") and NoneType in get_args(model.model_fields[name].annotation):
        message += " or None (null in YAML)"
    place = "".join(f"[{index}]" for index in indices if index != "[key]")
    return f"{name}{place}={value!r} {message}{_yaml_hint(value)}"


def _yaml_hint(value: Any) -> str:
    """YAML 1.1 reads numbers with an exponent but without a decimal point as text."""
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        number = None
    return "" if number is None else f"; YAML reads {value} as text, so write {number!r}"
