"""The findings of a check: how severe each is, what to do, and where it was found."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, get_args

Severity = Literal["error", "warning"]
"""An error stops training or silently makes its accuracy wrong. A warning may cost accuracy or time."""
SEVERITIES: tuple[Severity, ...] = get_args(Severity)

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Shows the progress of a task, given its title and size. Yields a function to call with each number of items done."""


@dataclass(frozen=True)
class Location:
    """Where something was found: one path or several related ones, and a detail about them."""

    paths: tuple[str, ...]
    """Relative to the checked folder."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A problem and all its locations."""

    severity: Severity
    name: str
    """A stable identifier, for programs."""
    title: str
    """What was found, in the plural."""
    advice: str
    """The consequences, and what to do."""
    locations: list[Location]


def finding_at(severity: Severity, name: str, title: str, advice: str, locations: list[Location]) -> list[Finding]:
    """A list with the finding, or an empty list if there are no locations."""
    if not locations:
        return []
    return [Finding(severity=severity, name=name, title=title, advice=advice, locations=locations)]
