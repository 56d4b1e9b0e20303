"""`localvit train`: train a model by a recipe, a file of settings, and flags."""

import ast
import inspect
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro

from localvit.train.config import TrainConfig, read_recipe, read_settings
from localvit_cli import UsageError


def _flags() -> Any:
    """A flag for each field of `TrainConfig`, with its type and docstring; those not given stay out of the dict.

    Only a dict tells what was given from what was left at its default, which a recipe may change.
    """
    (class_body,) = (node.body for node in ast.parse(inspect.getsource(TrainConfig)).body)  # type: ignore[attr-defined]
    help_of = {
        named.target.id: text.value.value.replace("`", "")
        for named, text in pairwise(class_body)
        if isinstance(named, ast.AnnAssign) and isinstance(named.target, ast.Name)
    }
    flags = {
        field.name: Annotated[
            field.type, tyro.conf.arg(help=help_of[field.name], help_behavior_hint=f"(default: {field.default})")
        ]
        for field in fields(TrainConfig)
    }
    return TypedDict("Flags", flags, total=False)  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model. Flags go before the settings of --config, and those before the recipe's."""

    recipe: str | None = None
    """A recipe that comes with the package, like digits."""
    config: Path | None = None
    """A YAML file of settings, named like the flags with `_` for `-`."""
    flags: Annotated[_flags(), tyro.conf.arg(name="")]  # type: ignore[valid-type]

    def to_config(self) -> TrainConfig:
        """The recipe's settings, the file's, and the flags', later ones first. Raises UsageError for a bad one."""
        try:
            merged = read_recipe(self.recipe) if self.recipe else {}
            if self.config:
                merged |= read_settings(self.config)
            return TrainConfig.of(merged | self.flags)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def run(self) -> None:
        """Train, and say where the checkpoints are."""
        run_training(self.to_config())


def run_training(config: TrainConfig) -> None:
    """Train as told with a live account of it, and print the last epoch's accuracy and where its checkpoint is."""
    from localvit.train.loop import fit
    from localvit.train.recipe import build
    from localvit.train.state import BEST, LAST
    from localvit_cli.console import progress, say

    run = build(config, say)
    train_pictures = len(run.batches.order)
    say(f"model: {config.model}, {train_pictures:,} pictures to train on, {len(run.val_pictures):,} to evaluate on")
    with progress("train", run.total_pictures) as advance:
        rows = fit(run, advance, say)
    best = max(rows, key=lambda row: row["test_acc1"])
    say(f"best of the epochs: Acc@1 {best['test_acc1']:.3f} in epoch {best['epoch']:.0f}, {config.output_dir / BEST}")
    print(f"Acc@1 {rows[-1]['test_acc1']:.3f} {config.output_dir / LAST}", flush=True)
