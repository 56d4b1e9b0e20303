"""A study: the same training for several arms, seeds and lengths of schedule, described by one YAML file.

An arm is the settings that it changes. All arms share everything else, and the seed decides the order of the images and
their augmentation, so that two arms with one seed differ only in what is studied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from localvit.train.compare import Run, read_runs
from localvit.train.config import Count, TrainConfig
from localvit.train.recipe import describe_errors, read_recipe, read_settings
from localvit.train.run_folder import CONFIG, contains_run

STUDIES = Path(__file__).parent / "studies"
"""Folder of the studies in this package, `NAME.yaml` each."""
OWN = ("seed", "epochs", "output_dir")
"""Settings that the study itself gives to each run."""


NEUTRAL = ("output_dir", "workers", "device", "checkpoint_steps", "keep", "tensorboard", "wandb")
"""Settings that may differ when a study is continued."""


class Finding(BaseModel):
    """What was published, or is expected: one arm is better than another."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    better: str
    than: str
    source: str
    """Where it was published."""


class Study(BaseModel):
    """What a file of a study says. Raises ValidationError for an unknown name or a wrong type."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str
    """What the study asks."""
    recipe: str | None = None
    """Recipe that all arms start from; without one, the defaults of `localvit train`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of all arms, over those of the recipe."""
    arms: Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]+$")], dict[str, Any]], Field(min_length=2)]
    """What each arm changes, by its name."""
    baseline: str
    """The arm that gains are measured from."""
    epochs: Annotated[tuple[Count, ...], Field(min_length=1)]
    """Lengths of the schedule."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """Seeds of each arm."""
    findings: tuple[Finding, ...] = ()
    """What was published."""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        named = [self.baseline, *(name for each in self.findings for name in (each.better, each.than))]
        if unknown := [name for name in named if name not in self.arms]:
            raise ValueError(f"{unknown[0]!r} is not one of the arms {', '.join(self.arms)}")
        for place, settings in (("settings", self.settings), *self.arms.items()):
            if own := [name for name in OWN if name in settings]:
                raise ValueError(f"{place} sets {own[0]}, which the study gives to each run")
        return self


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run of a study."""

    arm: str
    epochs: int
    seed: int
    config: TrainConfig
    given: frozenset[str]
    """The settings that the study determines. The others are derived or defaults."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.config.output_dir.name

    def read(self) -> Run | None:
        """The run in its folder, finished or not; None if there is none.

        Raises:
            FileExistsError: The folder has a run with other settings.
            ValueError: The files in it are damaged.
        """
        folder = self.config.output_dir
        if not (contains_run(folder) or (folder / CONFIG).exists()):
            return None
        recorded = read_settings(folder / CONFIG) if (folder / CONFIG).exists() else {}
        mine = self.config.to_dict()
        different = [
            name
            for name in sorted(self.given.difference(NEUTRAL))
            if name in recorded and _comparable(name, recorded[name]) != _comparable(name, mine[name])
        ]
        if different:
            raise FileExistsError(
                f"{folder} has a run with other settings ({', '.join(different)}): choose another --output-dir, or "
                "remove that folder"
            )
        [run] = read_runs([folder])
        return run

    @property
    def is_finished(self) -> bool:
        """Whether it needs no more training. Raises as `read`."""
        run = self.read()
        return run is not None and run.state in ("done", "stopped early")


def _comparable(name: str, value: Any) -> Any:
    return Path(value).resolve() if name == "data_path" and isinstance(value, str) else value


def study_names() -> list[str]:
    """Names of the studies in this package, sorted."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def read_study(source: str) -> Study:
    """The study in a YAML file, or the one of this package with that name.

    Raises:
        FileNotFoundError: No such file or name.
        ValueError: The file is not a study; the message has a part for each mistake.
    """
    path = STUDIES / f"{source}.yaml" if source in study_names() else Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no study {source!r}; give a YAML file or one of {', '.join(study_names()) or 'no names'}"
        )
    content = read_settings(path)
    try:
        return Study(**content)
    except ValidationError as error:
        raise ValueError(f"{path}: {_mistakes(error)}") from error


def study_runs(study: Study, output_dir: Path, changes: Mapping[str, Any]) -> list[StudyRun]:
    """The runs of a study, short schedules first, and all arms of a seed one after another.

    So an interrupted study has complete comparisons of the seeds that it has finished.

    Args:
        study: The study.
        output_dir: Its folder; each run has a folder in it.
        changes: Settings of all runs, such as `data_path` and `device`, over those of the study.

    Raises:
        ValueError: A setting is not valid, or is one that the study gives to each run.
    """
    if own := [name for name in OWN if name in changes]:
        raise ValueError(f"{own[0]} cannot be set for all runs: the study gives each run its own")
    return [
        _study_run(study, arm, epochs, seed, output_dir, changes)
        for epochs in sorted(study.epochs)
        for seed in study.seeds
        for arm in study.arms
    ]


def _study_run(
    study: Study, arm: str, epochs: int, seed: int, output_dir: Path, changes: Mapping[str, Any]
) -> StudyRun:
    own = {"epochs": epochs, "seed": seed, "output_dir": output_dir / f"{arm}-e{epochs}-s{seed}"}
    settings: dict[str, Any] = {}
    for source in (read_recipe(study.recipe) if study.recipe else {}, study.settings, changes, study.arms[arm], own):
        arguments = settings.get("model_args", {}) | source.get("model_args", {})
        settings |= source
        if arguments:
            settings["model_args"] = arguments
    try:
        config = TrainConfig(**settings)
    except ValidationError as error:
        raise ValueError(f"arm {arm}: {describe_errors(error)}") from error
    return StudyRun(arm=arm, epochs=epochs, seed=seed, config=config, given=frozenset(settings))


def chosen(study: Study, epochs: Sequence[int], seeds: Sequence[int], arms: Sequence[str]) -> Study:
    """The study with other lengths and seeds, or some of its arms; empty means its own.

    Raises:
        ValueError: For an unknown arm, or a value out of range.
    """
    if unknown := [name for name in arms if name not in study.arms]:
        raise ValueError(f"there is no arm {unknown[0]!r}; the arms are {', '.join(study.arms)}")
    kept = {name: values for name, values in study.arms.items() if not arms or name in arms or name == study.baseline}
    findings = [each for each in study.findings if each.better in kept and each.than in kept]
    changed = {
        "arms": kept,
        "findings": findings,
        **({"epochs": tuple(dict.fromkeys(epochs))} if epochs else {}),
        **({"seeds": tuple(dict.fromkeys(seeds))} if seeds else {}),
    }
    try:
        return Study(**study.model_dump() | changed)
    except ValidationError as error:
        raise ValueError(_mistakes(error)) from error


def _mistakes(error: ValidationError) -> str:
    lines, wrong = [], set()
    for each in error.errors():
        # pydantic does not count wrong items, and then also complains that there are too few.
        if each["type"] != "too_short" or each["loc"][:1] not in wrong:
            lines.append(f"{'.'.join(map(str, each['loc'])) or 'study'}: {each['msg']}")
        wrong.add(each["loc"][:1])
    return "; ".join(lines)
