"""`localvit study`: run what is missing of a study, and report what is finished."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from localvit.data.cached_images import DecodedImages
from localvit.train.builder import build
from localvit.train.compare import Run
from localvit.train.dry_run import duration, measure
from localvit.train.loop import Stopped, fit
from localvit.train.study import Study as Description
from localvit.train.study import StudyRun, chosen, read_study, study_names, study_runs
from localvit.train.study_report import converged, draw, to_markdown
from localvit.train.summary import write_summary
from localvit.utils.distributed import read_launch
from localvit.utils.files import atomic_write, check_writable
from localvit.utils.tables import format_table
from localvit_cli import UsageError
from localvit_cli.console import progress
from localvit_cli.tyro_rules import named_values, optional

logger = logging.getLogger(__name__)

REPORT, FIGURE = "study.md", "study.png"


@dataclass(frozen=True, kw_only=True)
class Study:
    """Run what is missing of a study (arms x seeds x schedules), and report it.

    Finished runs are kept, interrupted ones resumed. Without NAME: a list.
    """

    source: Annotated[tyro.conf.Positional[str | None], optional("NAME|FILE.yaml")] = None
    """A study of this package, or a YAML file (docs/study.md)."""
    data_path: Annotated[Path | None, optional("DIR", "that of the study")] = None
    """Folder of the images, with train/CLASS and val/CLASS."""
    output_dir: Annotated[Path | None, optional("DIR", "runs/study-NAME")] = None
    """Folder for the runs, each in a folder of its own, and for the report."""
    epochs: Annotated[tuple[int, ...], optional("N...", "those of the study")] = ()
    """Lengths of the schedule."""
    seeds: Annotated[tuple[int, ...], optional("N...", "those of the study")] = ()
    """Seeds of each arm."""
    arms: Annotated[tuple[str, ...], optional("NAME...", "all")] = ()
    """Only these arms, and the baseline."""
    set: Annotated[tuple[str, ...], optional("NAME=VALUE...")] = ()
    """Other settings of all runs, as in a settings file of train: device=cuda, batch_size=64."""
    dry_run: bool = False
    """Say what would run and how long it would take, and train nothing."""

    def run(self) -> int:
        """Run the study and print its report. Returns the exit status."""
        if self.source is None:
            print(format_table([(name, read_study(name).question) for name in study_names()]))
            return 0
        launch, _ = read_launch()
        if launch is not None and launch.world_size > 1:
            raise UsageError("a study trains its runs one after another in one process: start it without torchrun")
        output_dir = self.output_dir or Path("runs") / f"study-{Path(self.source).stem}"
        try:
            study = chosen(read_study(self.source), self.epochs, self.seeds, self.arms)
            runs = study_runs(study, output_dir, self._changes())
        except ValueError as error:
            raise UsageError(str(error)) from error
        missing = [run for run in runs if not run.is_finished]
        if self.dry_run:
            print(_plan(runs, missing))
            return 0
        check_writable(output_dir / REPORT)
        status = _train(missing, len(runs))
        _report(study, runs, output_dir)
        return status

    def _changes(self) -> dict[str, Any]:
        changes = named_values(self.set)
        return changes | ({"data_path": str(self.data_path)} if self.data_path else {})


def _train(missing: Sequence[StudyRun], total: int) -> int:
    """Train the missing runs. Returns the exit status: 1 if any failed, and that of a signal that stopped one."""
    failed = 0
    decoded = DecodedImages()
    for number, run in enumerate(missing, total - len(missing) + 1):
        logger.info(f"run {number} of {total}: {run.name}")
        try:
            training = build(run.config, resume="auto", decoded=decoded)
            with progress(run.name, training.images_left) as advance:
                result = fit(training, progress=advance)
        except Stopped as stopped:
            logger.info(f"localvit: {stopped.args[0].partition(';')[0]}; the same command continues the study")
            return stopped.exit_status
        except (FloatingPointError, FileExistsError) as error:  # of this run alone
            logger.error(f"{run.name}: {error}")
            failed += 1
            continue
        write_summary(training.config, result, training.options.device)
    return 1 if failed else 0


def _plan(runs: Sequence[StudyRun], missing: Sequence[StudyRun]) -> str:
    """What would run, with the time that a few steps of each arm predict."""
    seconds_of_arm: dict[str, float] = {}
    decoded = DecodedImages()
    rows, total = [], 0.0
    for run in runs:
        found = run.read()
        done = len(found.rows) if found else 0
        if run not in missing:
            rows.append((run.name, "finished", "-"))
            continue
        if run.arm not in seconds_of_arm:
            config = run.config.model_copy(update={"output_dir": run.config.output_dir / "dry-run"})
            training = build(config, decoded=decoded)
            timing = measure(training)
            seconds_of_arm[run.arm] = timing.of(training, 1)
        left = (run.epochs - done) * seconds_of_arm[run.arm]
        total += left
        rows.append((run.name, f"resumes after epoch {done}" if done else "to run", duration(left)))
    table = format_table(rows, headings=("run", "state", "about (h:mm:ss)"), right=(2,))
    decoding = f", including {duration(decoded.seconds)} for decoding images" if decoded.seconds else ""
    total += decoded.seconds
    return f"{table}\n\n{len(missing)} of {len(runs)} runs are to be trained, in about {duration(total)}{decoding}"


def _report(study: Description, runs: Sequence[StudyRun], output_dir: Path) -> None:
    """Write the report and the figure of the finished runs, and print the report."""
    finished: list[tuple[StudyRun, Run]] = []
    for run in runs:
        if run.is_finished and (found := run.read()):
            finished.append((run, found))
    text = to_markdown(study, finished, len(runs) - len(finished))
    if drawn := converged(finished):
        try:
            draw(study, drawn, output_dir / FIGURE)
            text += f"\n![Accuracy of the arms by epoch, and at the end of each schedule]({FIGURE})\n"
        except ImportError as error:
            logger.warning(f"{FIGURE} is not drawn: {error}")
    with atomic_write(output_dir / REPORT) as file:
        file.write_text(text, encoding="utf-8")
    print(text, flush=True)
    logger.info(f"report: {output_dir / REPORT}")
