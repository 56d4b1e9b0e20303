"""`localvit train`: train a model with settings from a recipe, a YAML file and flags."""

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import ValidationError

from localvit.train.builder import build
from localvit.train.config import (
    AugmentationSettings,
    AverageSettings,
    DataSettings,
    LossSettings,
    MixingSettings,
    ModelSettings,
    OptimizationSettings,
    RunSettings,
    ScheduleSettings,
    SettingsGroup,
    TrainConfig,
)
from localvit.train.derived import scale_recipe_rates
from localvit.train.dry_run import dry_run
from localvit.train.loop import Stopped, fit
from localvit.train.recipe import describe_errors, read_recipe, read_settings, recipe_names
from localvit.train.resume import recorded_settings
from localvit.train.run_folder import CONFIG, LAST, states
from localvit.train.summary import summary_rows, write_summary
from localvit.utils.devices import choose_device
from localvit.utils.distributed import is_main, process_group
from localvit.utils.tables import format_table
from localvit_cli import UsageError
from localvit_cli.console import progress
from localvit_cli.streams import printable
from localvit_cli.tyro_rules import REGISTRY, optional

logger = logging.getLogger(__name__)

_RECIPE_HELP = f"Recipe that comes with the package: {', '.join(recipe_names())}."
_RESUME_HELP = (
    "auto resumes the run in --output-dir, or starts a new one. A file resumes from that checkpoint. Without --config "
    "and --recipe, the settings are those of the run."
)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model. Flags override --config, and --config overrides --recipe.

    The defaults shown are those of the given --recipe and --config.
    """

    recipe: Annotated[str | None, optional("NAME"), tyro.conf.arg(help=_RECIPE_HELP)] = None
    config: Annotated[Path | None, optional("FILE")] = None
    """YAML file of settings, named like the flags but with _ instead of -."""
    resume: Annotated[str | None, optional("auto|FILE"), tyro.conf.arg(help=_RESUME_HELP)] = None
    dry_run: bool = False
    """Run two training steps, evaluate one batch, print the size and duration of the run, and write nothing."""
    data: DataSettings
    model: ModelSettings
    optimization: OptimizationSettings
    schedule: ScheduleSettings
    average: AverageSettings
    augmentation: AugmentationSettings
    mixing: MixingSettings
    loss: LossSettings
    run_and_output: RunSettings

    def to_config(self) -> TrainConfig:
        """The settings of all groups. Raises UsageError if they are not valid.

        Set are those that the groups say are set, and those of the recipe, except its batch size.
        """
        groups = _groups(self).values()
        settings = {name: value for group in groups for name, value in group}
        given = {name for group in groups for name in group.model_fields_set}
        recipe = read_recipe(self.recipe) if self.recipe else {}
        rates = scale_recipe_rates(recipe, settings)
        settings |= {name: rate for name, rate in rates.items() if name not in given}
        try:
            config = TrainConfig(**settings)
        except ValidationError as error:
            raise UsageError(describe_errors(error)) from error
        return TrainConfig.model_construct(_fields_set=given | (recipe.keys() - {"batch_size"}), **dict(config))

    def run(self) -> int:
        """Train, and print the final accuracy and the checkpoint's path. Returns the exit status."""
        return run_training(self.to_config(), self.resume, is_dry_run=self.dry_run)


def parse(arguments: Sequence[str]) -> Train:
    """The command that `arguments` describe, with defaults from the --recipe and --config among them.

    Raises UsageError for a recipe or file that cannot be used, and SystemExit for --help or flags that cannot be read.
    """
    loaded = _defaults(arguments)
    command = tyro.cli(
        Train,
        prog="localvit train",
        args=list(arguments),
        default=loaded,
        config=(tyro.conf.OmitArgPrefixes,),
        registry=REGISTRY,
    )
    command = _with_fields_set(command, _names_of_flags(arguments) | _names_in_file(loaded))
    # Arguments of the model given as flags are added to those of the recipe.
    merged = {"model_args": loaded.model.model_args | command.model.model_args}
    if command.model.localize is not None:
        merged["localize"] = (loaded.model.localize or {}) | command.model.localize
    return replace(command, model=command.model.model_copy(update=merged))


def _names_of_flags(arguments: Sequence[str]) -> set[str]:
    """The names of the settings that flags give."""
    flags = {each.removeprefix("--").partition("=")[0].replace("-", "_") for each in arguments if each.startswith("--")}
    return {name for name in TrainConfig.model_fields if name in flags or f"no_{name}" in flags}


def _names_in_file(loaded: Train) -> set[str]:
    """The names of the settings that were loaded, except those that are the recipe's."""
    recipe = read_recipe(loaded.recipe) if loaded.recipe else {}
    groups = _groups(loaded).values()
    return {name for group in groups for name in group.model_fields_set if getattr(group, name) != recipe.get(name)}


def _groups(command: Train) -> dict[str, SettingsGroup]:
    values = {each.name: getattr(command, each.name) for each in fields(command)}
    return {name: value for name, value in values.items() if isinstance(value, SettingsGroup)}


def _with_fields_set(command: Train, names: set[str]) -> Train:
    """The command whose groups say that only the settings with these names are set. tyro sets all of them."""
    groups: dict[str, Any] = {
        name: type(group).model_construct(_fields_set=names & dict(group).keys(), **dict(group))
        for name, group in _groups(command).items()
    }
    return replace(command, **groups)


def _defaults(arguments: Sequence[str]) -> Train:
    """The command without other flags than those that name where settings come from."""
    sources = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flags in (("--recipe",), ("--config",), ("--resume",), ("--output-dir", "--output_dir")):
        sources.add_argument(*flags, nargs="?")
    given, _ = sources.parse_known_args(list(arguments))
    config = Path(given.config) if given.config else None
    settings: dict[str, Any] = {}
    if given.resume and not config and not given.recipe:
        config, settings = _settings_to_resume(given.resume, given.output_dir)
    try:
        settings |= read_recipe(given.recipe) if given.recipe else {}
        settings |= read_settings(config) if config else {}
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        _check_names(settings)
        return Train(recipe=given.recipe, **_grouped(settings))
    except ValidationError as error:
        raise UsageError(f"{config or given.recipe or given.resume}: {describe_errors(error)}") from error


def _settings_to_resume(resume: str, output_dir: str | None) -> tuple[Path | None, dict[str, Any]]:
    """The settings file of the run to resume, or otherwise the settings in its checkpoint."""
    if resume != "auto":
        return None, recorded_settings(Path(resume))
    folder = Path(output_dir or TrainConfig.model_fields["output_dir"].default)
    if (folder / CONFIG).exists():
        return folder / CONFIG, {}
    recorded = (recorded_settings(path) for path in states(folder))
    return None, next(filter(None, recorded), {})


def _check_names(settings: Mapping[str, Any]) -> None:
    """Raise ValidationError for names that are not settings."""
    TrainConfig(**{name: value for name, value in settings.items() if name not in TrainConfig.model_fields})


def _grouped(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The groups of `Train` with these settings, by the group's name."""
    return {
        group.name: group.type(**{name: settings[name] for name in group.type.model_fields if name in settings})
        for group in fields(Train)
        if isinstance(group.type, type) and issubclass(group.type, SettingsGroup)
    }


def run_training(config: TrainConfig, resume: str | None = None, *, is_dry_run: bool = False) -> int:
    """Train with progress and log messages on standard error; print the final accuracy and the checkpoint's path.

    A dry run prints what the run would be and writes nothing.

    Args:
        config: the settings.
        resume: as for `localvit.train.build`.
        is_dry_run: whether to run only a few steps.

    Returns:
        The exit status: 0, or 128 plus the number of the signal that stopped the run.
    """
    with process_group(choose_device(config.device)[0]):
        return _dry_run(config, resume) if is_dry_run else _train(config, resume)


def _dry_run(config: TrainConfig, resume: str | None) -> int:
    facts = dry_run(build(config, resume=resume))
    if is_main():
        print(format_table(list(facts.items())), flush=True)
    return 0


def _train(config: TrainConfig, resume: str | None) -> int:
    training = build(config, resume=resume)
    logger.info(str(training))
    try:
        with progress("train", training.images_left) as advance:
            result = fit(training, progress=advance)
    except Stopped as stopped:
        logger.info(f"localvit: {stopped}")
        return stopped.exit_status
    if is_main():
        config, device = training.config, training.options.device
        logger.info(format_table(summary_rows(config, result, device)))
        try:
            print(printable(f"Acc@1 {result.last['test_acc1']:.3f} {config.output_dir / LAST}"), flush=True)
        finally:  # the report is written even if nobody reads the result
            logger.info(f"report: {write_summary(config, result, device)}")
    return 0
