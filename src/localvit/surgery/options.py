"""The arguments of `localize` as plain values, for checkpoints, configuration files and the command line.

`{"gate": "se"}` stands for `Adapter(gate="se")` and `{"method": "replace", "act": "hs"}` for `Replace(act="hs")`, next
to the other arguments of `localize`, such as `"blocks": "1-4"`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from localvit.surgery.adapter import Adapter
from localvit.surgery.replace import Replace

Method = Adapter | Replace
METHODS: dict[str, type[Adapter] | type[Replace]] = {"adapter": Adapter, "replace": Replace}
OTHERS = ("blocks", "filter_fn", "grid", "num_prefix_tokens", "trainable")
"""Arguments of `localize` that both methods share."""


def options_of(method: Method) -> dict[str, Any]:
    """A method as plain values; what has its default is left out."""
    options = {} if isinstance(method, Adapter) else {"method": "replace"}
    for field in dataclasses.fields(method):
        if (value := getattr(method, field.name)) != field.default:
            options[field.name] = value
    return options


def parse_options(options: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """The method that plain values describe, and the other arguments of `localize`.

    Raises:
        ValueError: for an unknown method, or a value that the method does not allow.
        TypeError: for a name that is not an option of the method.
    """
    values = dict(options)
    name = values.pop("method", "adapter")
    if name not in METHODS:
        raise ValueError(f"method={name!r} is not known; choose one of {', '.join(METHODS)}")
    others = {key: values.pop(key) for key in OTHERS if key in values}
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    if unknown := values.keys() - set(known):
        raise TypeError(
            f"localize with method={name!r} has no option {', '.join(sorted(unknown))}; its options are "
            f"{', '.join(known)}, and with every method {', '.join(OTHERS)}"
        )
    if isinstance(others.get("grid"), list):  # JSON has no tuples.
        others["grid"] = tuple(others["grid"])
    return METHODS[name](**values), others
