"""What a check has to say: findings, each with how bad it is, what follows from it, and where it is."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, get_args

Severity = Literal["error", "warning"]
"""An error stops training, or makes its accuracy untrue without a sign; a warning may cost accuracy or time."""
SEVERITIES: tuple[Severity, ...] = get_args(Severity)

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Opens an account of some work, from its title and size; the call that it yields counts on."""


@dataclass(frozen=True)
class Place:
    """Where something was found: an image or folder, or several that belong together, and what is special there."""

    paths: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that would hurt, everywhere that it was found."""

    severity: Severity
    name: str
    """A short name that stays, for programs."""
    title: str
    """What was found, in the plural."""
    advice: str
    """What follows from it, and what to do."""
    places: list[Place]


def found(severity: Severity, name: str, title: str, advice: str, places: list[Place]) -> list[Finding]:
    """The finding, or none where there are no places of it."""
    if not places:
        return []
    return [Finding(severity=severity, name=name, title=title, advice=advice, places=places)]
