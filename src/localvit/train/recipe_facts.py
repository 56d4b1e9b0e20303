"""What the comments at the top of a recipe say: what it is for, what to expect, on which hardware, with which command.

The comments are the only place where this is stated. They begin with what the recipe is for; then come `Expected:`,
`Hardware:`, `Command:` and, if there are any, other paragraphs such as `Arms`.
"""

import re
from dataclasses import dataclass
from itertools import takewhile

from localvit.train.recipe import RECIPES, read_recipe

_HEADINGS = re.compile(
    r"(?:^|(?<=[.:)] ))(Expected|Hardware|Command|One GPU|Other models|Arms[^:.]*|Python's[^:.]*)[:,] "
)


@dataclass(frozen=True, kw_only=True)
class RecipeFacts:
    """What a recipe says about itself."""

    name: str
    summary: str
    """What it trains on what, in a sentence."""
    expected: str
    """The accuracy to expect, and how it is known."""
    hardware: str
    """What the numbers are from, or what the recipe needs."""
    command: str
    """A command that trains with it, in one line."""
    settings: dict[str, object]
    """Its settings that differ from the defaults."""


def recipe_text(name: str) -> str:
    """The file of a recipe. Raises ValueError for an unknown name."""
    read_recipe(name)
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def read_facts(name: str) -> RecipeFacts:
    """What a recipe says about itself. Raises ValueError for an unknown name."""
    comments = takewhile(lambda line: line.startswith("#"), recipe_text(name).splitlines())
    lines = [line.removeprefix("#").strip() for line in comments]
    parts = _HEADINGS.split(" ".join(lines))
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    return RecipeFacts(
        name=name,
        summary=re.split(r"(?<=[.:]) ", parts[0].strip())[0].rstrip(".:"),
        expected=sections["Expected"].strip(),
        hardware=sections["Hardware"].strip(),
        command=_command(lines),
        settings=read_recipe(name),
    )


def _command(lines: list[str]) -> str:
    """The command, whose lines end in a backslash where another one follows."""
    start = next(index for index, line in enumerate(lines) if "Command: " in line)
    words = [lines[start].partition("Command: ")[2]]
    while words[-1].endswith("\\"):
        words[-1] = words[-1].removesuffix("\\").strip()
        words.append(lines[start + len(words)])
    return " ".join(words)
