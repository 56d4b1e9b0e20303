"""`localvit recipes`: the recipes of the package, with what to expect, on which hardware, and the command."""

import json
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from localvit.train.recipe import recipe_names
from localvit.train.recipe_facts import RecipeFacts, read_facts, recipe_text
from localvit.utils.tables import format_table
from localvit_cli import UsageError
from localvit_cli.tyro_rules import optional


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the training recipes, or print one of them as a file for train --config."""

    name: Annotated[tyro.conf.Positional[str | None], optional("NAME", "all of them")] = None
    """The recipe to print: its settings, below comments with its expected accuracy, hardware, command and arms."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> None:
        """Print the list or the recipe."""
        names = recipe_names()
        if self.name is not None and self.name not in names:
            raise UsageError(f"there is no recipe {self.name!r}; the recipes are {', '.join(names)}")
        if self.json:
            facts = [asdict(read_facts(name)) for name in ([self.name] if self.name else names)]
            print(json.dumps(facts[0] if self.name else facts, indent=2))
        elif self.name:
            print(recipe_text(self.name), end="")
        else:
            print("\n\n".join(_text(read_facts(name)) for name in names))


def _text(facts: RecipeFacts) -> str:
    rows = [
        (facts.name, facts.summary),
        ("  expected", facts.expected),
        ("  hardware", facts.hardware),
    ]
    return f"{format_table(rows)}\n  {facts.command}"  # in one line, which can be copied
