"""Settings as YAML and flags give them: reading files of them, and holding each against the kind of its field."""

import difflib
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

RECIPES = Path(__file__).parent / "recipes"


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, to be merged with others and given to `TrainConfig.of`.

    Raises FileNotFoundError, or ValueError when it is no YAML mapping.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold settings, a line each, like `epochs: 100`")
    return settings


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe that comes with the package. Raises ValueError for an unknown name."""
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"no recipe is called {name!r}; there is {', '.join(known)}")
    return read_settings(RECIPES / f"{name}.yaml")


def closest(name: str, known: Iterable[str]) -> str:
    """A question that names what `name` may have been meant to be, or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def check_kind(name: str, value: Any, kind: Any) -> None:
    """Raise ValueError unless `value` is of the annotated `kind` of the field `name`."""
    if not _is(value, kind):
        raise ValueError(f"{name}={value!r} must be {_said(kind)}{_yaml_hint(value)}")


def converted(value: Any, kind: Any) -> Any:
    """Lists as tuples, and text as a path, where the field is one."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and str not in (kind, *get_args(kind)) and Path in (kind, *get_args(kind)):
        return Path(value)
    return value


def _is(value: Any, kind: Any) -> bool:
    """Whether `value` is of the annotated type; whole numbers are numbers, truth values are not."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(_is(value, option) for option in get_args(kind))
    if origin is Literal:
        return value in get_args(kind)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(item, get_args(kind)[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _said(kind: Any) -> str:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_said(option) for option in get_args(kind))
    if origin is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if origin is tuple:
        return {int: "whole numbers", float: "numbers"}.get(get_args(kind)[0], "a list of texts")
    if origin is dict:
        return "names with values"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    return names.get(kind, "none")


def _yaml_hint(value: Any) -> str:
    """YAML 1.1 wants a point before an exponent, which nobody remembers."""
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        number = None
    return "" if number is None else f"; YAML reads {value} as text, so write {number!r}"
