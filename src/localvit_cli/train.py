"""`localvit train`: train a model by a recipe, a file of settings, and flags."""

import ast
import inspect
import os
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro

from localvit.train.config import TrainConfig
from localvit.train.run_folder import CONFIG
from localvit.train.settings import read_recipe, read_settings
from localvit_cli import UsageError
from localvit_cli.named_values import named_values

_NAMED_VALUES = ("model_args", "localize")


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
    flags: dict[str, Any] = {
        field.name: Annotated[
            field.type, tyro.conf.arg(help=help_of[field.name], help_behavior_hint=f"(default: {field.default})")
        ]
        for field in fields(TrainConfig)
        if field.name not in _NAMED_VALUES
    }
    for name in _NAMED_VALUES:
        flags[name] = Annotated[tuple[str, ...], tyro.conf.arg(help=help_of[name], metavar="NAME=VALUE ...")]
    return TypedDict("Flags", flags, total=False)  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model. Flags go before the settings of --config, and those before the recipe's."""

    recipe: str | None = None
    """A recipe that comes with the package, like digits."""
    config: Path | None = None
    """A YAML file of settings, named like the flags with `_` for `-`."""
    resume: str | None = None
    """auto goes on with the run in the output folder, under its settings, or begins one; a file goes on from it."""
    dry_run: bool = False
    """Build everything, take two steps, evaluate a batch, and say what the run would be."""
    flags: Annotated[_flags(), tyro.conf.arg(name="")]  # type: ignore[valid-type]

    def to_config(self) -> TrainConfig:
        """The recipe's settings, the file's, and the flags', later ones first. Raises UsageError for a bad one."""
        try:
            merged = read_recipe(self.recipe) if self.recipe else {}
            if config := self.config or self._config_to_resume():
                merged |= read_settings(config)
            named = {
                name: (merged.get(name) or {}) | named_values(f"--{name.replace('_', '-')}", self.flags[name])
                for name in _NAMED_VALUES
                if name in self.flags
            }
            return TrainConfig.of(merged | self.flags | named)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def _config_to_resume(self) -> Path | None:
        """What the run in the output folder was told, where nothing else is said."""
        written = Path(self.flags.get("output_dir", TrainConfig.output_dir)) / CONFIG
        return written if self.resume == "auto" and not self.recipe and written.exists() else None

    def run(self) -> int:
        """Train, and say where the checkpoints are."""
        config = self.to_config()
        return run_training(config, self.resume, dry_run=self.dry_run)


def run_training(config: TrainConfig, resume: str | None = None, *, dry_run: bool = False) -> int:
    """Train as told with a live account of it, and print the last epoch's accuracy and where its checkpoint is.

    Returns the exit status: 0, or what stands for the signal that stopped the run. A process that torchrun started
    again goes on by itself. A dry run says what the run would be, and leaves nothing.
    """
    from localvit.utils.devices import choose_device
    from localvit.utils.distributed import process_group

    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        resume = "auto"
    with process_group(choose_device(config.device)[0]):
        return _rehearse(config, resume) if dry_run else _train(config, resume)


def _rehearse(config: TrainConfig, resume: str | None) -> int:
    from localvit.train.build import build
    from localvit.train.dry_run import rehearse
    from localvit.utils.distributed import is_main
    from localvit.utils.tables import format_table
    from localvit_cli.console import say

    told = rehearse(build(config, say, resume))
    if is_main():
        print(format_table(list(told.items())), flush=True)
    return 0


def _train(config: TrainConfig, resume: str | None) -> int:
    from localvit.train.build import build
    from localvit.train.loop import fit
    from localvit.train.run_folder import LAST
    from localvit.train.stopping import Stopped
    from localvit.train.summary import summary_rows, write_summary
    from localvit.utils.distributed import is_main
    from localvit.utils.tables import format_table
    from localvit_cli.console import progress, say

    run = build(config, say, resume)
    train_images = len(run.batches.images.images)
    say(f"model: {config.model}, {train_images:,} images to train on, {len(run.val_images):,} to evaluate on")
    try:
        with progress("train", run.images_left) as advance:
            rows = fit(run, advance, say)
    except Stopped as stopped:
        say(f"localvit: {stopped}")
        return stopped.exit_status
    if rows and is_main():
        told = (config, run.state.metrics, run.options.device)
        say(format_table(summary_rows(*told)))
        say(f"report: {write_summary(*told)}")
        print(f"Acc@1 {rows[-1]['test_acc1']:.3f} {config.output_dir / LAST}", flush=True)
    return 0
