"""The result of a study: accuracies with their spread over seeds, gains per seed, and what they say of a finding."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from localvit.train.compare import Run
from localvit.train.study import Finding, Study, StudyRun
from localvit.utils.intervals import interval_text


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """An arm with one length of schedule, of the seeds that are finished."""

    arm: str
    epochs: int
    acc1: dict[int, float]
    """Acc@1 after the last epoch in percent, by seed."""
    gains: dict[int, float]
    """The difference from the baseline with the same seed, in points, where both are finished."""
    parameters: int
    """Number of trained parameters."""
    num_images: int | None
    """Number of validation images, if known."""


def arm_results(study: Study, finished: Sequence[tuple[StudyRun, Run]]) -> list[ArmResult]:
    """The results of a study's finished runs, by length of schedule and arm."""
    rows = {(each.epochs, each.arm, each.seed): run.rows[-1] for each, run in finished}
    results = []
    for epochs in sorted(study.epochs):
        for arm in study.arms:
            mine = {seed: rows[epochs, arm, seed] for seed in study.seeds if (epochs, arm, seed) in rows}
            if not mine:
                continue
            acc1 = {seed: row["test_acc1"] for seed, row in mine.items()}
            base = {seed: rows[key]["test_acc1"] for seed in acc1 if (key := (epochs, study.baseline, seed)) in rows}
            last = next(iter(mine.values()))
            results.append(
                ArmResult(
                    arm=arm,
                    epochs=epochs,
                    acc1=acc1,
                    gains={seed: acc1[seed] - base[seed] for seed in acc1 if seed in base},
                    parameters=int(last["n_parameters"]),
                    num_images=int(last["test_images"]) if "test_images" in last else None,
                )
            )
    return results


def mean_and_spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and sample standard deviation (n - 1); of a single value only the value."""
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{fmean(values):{sign}.2f}{spread}" if values else "-"


def converged(finished: Sequence[tuple[StudyRun, Run]]) -> list[tuple[StudyRun, Run]]:
    """The runs whose last validation loss is finite. The accuracy of others would pass for a result."""
    return [(each, run) for each, run in finished if math.isfinite(run.rows[-1]["test_loss"])]


def to_markdown(study: Study, finished: Sequence[tuple[StudyRun, Run]], unfinished: int) -> str:
    """The report: a table for each length of schedule, and the findings.

    Args:
        study: The study.
        finished: Its finished runs.
        unfinished: Number of its other runs.
    """
    kept = converged(finished)
    results = arm_results(study, kept)
    parts = [study.question]
    for epochs in sorted({each.epochs for each in results}):
        lines = [
            f"| arm, {_epochs(epochs)} | parameters | seeds | Acc@1 | 95 % interval | gain over {study.baseline} |",
            "|---|---|---|---|---|---|",
        ]
        for each in (each for each in results if each.epochs == epochs):
            values = list(each.acc1.values())
            gain = "-" if each.arm == study.baseline else mean_and_spread(list(each.gains.values()), "+")
            cells = (
                each.arm,
                f"{each.parameters:,}",
                ", ".join(map(str, each.acc1)),
                mean_and_spread(values),
                interval_text(fmean(values), each.num_images) if each.num_images else "-",
                gain,
            )
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    parts.append(
        "Acc@1 after the last epoch in percent: mean and sample standard deviation over seeds. The interval (Wilson) "
        "is that of the mean from the number of validation images of one run, without the variation between runs. "
        "Gains are differences between runs with the same seed, in points."
    )
    if study.findings and results:
        parts.append("\n".join(f"- {verdict(each, results)}" for each in study.findings))
    if diverged := [each.name for each, run in finished if (each, run) not in kept]:
        parts.append(f"Left out, because the last validation loss is not finite: {', '.join(diverged)}.")
    if unfinished:
        parts.append(f"Runs of the study that are not finished: {unfinished}. The same command continues.")
    return "\n\n".join(parts) + "\n"


def verdict(finding: Finding, results: Sequence[ArmResult]) -> str:
    """Whether the longest schedule with both arms confirms a finding, in a sentence."""
    claim = f"{finding.better} better than {finding.than} ({finding.source})"
    by_key = {(each.epochs, each.arm): each.acc1 for each in results}
    for epochs in sorted({each.epochs for each in results}, reverse=True):
        better, than = by_key.get((epochs, finding.better), {}), by_key.get((epochs, finding.than), {})
        gains = [better[seed] - than[seed] for seed in better if seed in than]
        if gains:
            return f"{claim}: {_direction(gains)} after {_epochs(epochs)}, {mean_and_spread(gains, '+')} points."
    return f"{claim}: not measured."


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' if number > 1 else ''}"


def _direction(gains: Sequence[float]) -> str:
    if len(gains) == 1:
        word = "the same direction" if gains[0] > 0 else "not the same direction"
        return f"{word}, with one seed only,"
    higher = sum(gain > 0 for gain in gains)
    if higher == len(gains):
        return f"confirmed with each of {len(gains)} seeds"
    if higher == 0:
        return f"not confirmed: not higher with any of {len(gains)} seeds"
    return f"undecided: higher with {higher} of {len(gains)} seeds"


def draw(study: Study, finished: Sequence[tuple[StudyRun, Run]], image: Path) -> Path:
    """Plot the accuracy by epoch of the longest schedule, and at the end of each schedule. Needs matplotlib."""
    from localvit.train.curves import draw_study  # of the extra `plot`

    longest = max(each.epochs for each, _ in finished)
    by_epoch: dict[str, list[list[float]]] = {arm: [] for arm in study.arms}
    at_end: dict[str, list[tuple[int, float]]] = {arm: [] for arm in study.arms}
    for each, run in finished:
        at_end[each.arm].append((each.epochs, run.rows[-1]["test_acc1"]))
        if each.epochs == longest:
            by_epoch[each.arm].append([row["test_acc1"] for row in run.rows])
    return draw_study(by_epoch, at_end, image)
