"""Arguments as the plain values that a file can hold: no scalars of numpy, no enumerations, no special containers."""

import enum
from collections.abc import Mapping, Sequence, Set
from typing import Any


def plain(value: Any) -> Any:
    """`value` as None, a bool, a number, a text, or a tuple, list or dictionary of these, where it stands for one.

    Scalars and arrays of numpy and torch become numbers and lists, an enumeration's member its value, a set a sorted
    list, and subclasses of the plain types these types themselves. Anything else is returned as it is.
    """
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, bool) or value is None:
        return value
    if callable(getattr(value, "tolist", None)):
        return value.tolist()
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, Set):
        return sorted(plain(item) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(item) for item in value]
    return value
