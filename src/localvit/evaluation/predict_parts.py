"""Predictions of several processes, restartable at any point, that together are those of one process.

The images are cut into the batches that one process would compute, and batch i belongs to process i modulo their
number. So every batch has the same images in it whoever computes it, and the results are bit-exact on equal machines.
A process appends one line per batch to a file of its own in a folder of parts. Whatever ends a process, its complete
lines remain: the next start, with any number of processes, computes only the batches that no file has.

Files of the folder:
    job.json                 what is computed; a start that asks for something else is refused
    part-ATTEMPT-RANK.jsonl  {"batch": its number, "predictions": one for each image}
    done-RANK                exists when the process has no batch left
    failed-RANK              why the process ended without finishing
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from localvit.data.images import ImageSequence
from localvit.evaluation.predict import Prediction, predict
from localvit.inference.runner import InferenceOptions, ModelSource
from localvit.utils.distributed import (
    Launch,
    broadcast_from_rank0,
    check_same_on_all_ranks,
    process_group,
    read_launch,
    run_on_all_ranks,
)
from localvit.utils.files import atomic_write

JOB = "job.json"
_ENDS = ("done", "failed")
_SECONDS_BETWEEN_LOOKS = 0.5


class PartsError(RuntimeError):
    """The parts cannot be used. The message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What this process has to compute, and where it writes it."""

    folder: Path
    """The folder of parts, which all processes see."""
    images: ImageSequence
    """All images."""
    batch_size: int
    """Images per batch."""
    rank: int
    """Rank of this process."""
    world_size: int
    """Number of processes."""
    file: Path
    """The file of this process."""
    missing: Sequence[int]
    """The batches that no file has."""

    @property
    def own(self) -> list[int]:
        """The batches of this process."""
        return list(self.missing[self.rank :: self.world_size])

    @property
    def own_images(self) -> int:
        """The number of images in them."""
        return sum(len(self.indices(batch)) for batch in self.own)

    def indices(self, batch: int) -> range:
        """The images of a batch."""
        start = batch * self.batch_size
        return range(start, min(start + self.batch_size, len(self.images)))


def open_parts(folder: Path, images: ImageSequence, batch_size: int, job: Mapping[str, Any]) -> Parts:
    """Open or continue a folder of parts, together with all processes of torchrun.

    Args:
        folder: the folder, which is created.
        images: all images, the same in every process.
        batch_size: images per batch.
        job: what else the results depend on, as JSON can represent it.

    Raises:
        PartsError: if the folder has parts of another job, or is not the same folder on every machine.
        ValueError: if the processes differ in what they are asked to compute.
    """
    launch, _ = read_launch()
    launch = launch or Launch(rank=0, world_size=1, local_rank=0, restarts=0)
    names = hashlib.sha256()
    for index in range(len(images)):
        names.update(images.name(index).encode(errors="surrogateescape") + b"\0")
    job = dict(job) | {"images": len(images), "names": names.hexdigest(), "batch_size": batch_size}
    with process_group(torch.device("cpu")):  # left again at once: results need no messages, which could time out
        check_same_on_all_ranks(job)
        broadcast_from_rank0(lambda: _create(folder, job))
        run_on_all_ranks(lambda: _check_shared(folder))
        for name in _ENDS:
            (folder / f"{name}-{launch.rank}").unlink(missing_ok=True)
        attempt = 1 + max((int(path.name.split("-")[1]) for path in folder.glob("part-*.jsonl")), default=0)
        finished = {batch for path in _files(folder) for batch, _ in _lines(path)}
        missing = [batch for batch in range(num_batches(images, batch_size)) if batch not in finished]
        # From here on files may change: every process has read them and removed its done-RANK of an earlier start.
        check_same_on_all_ranks({"the parts that they see": (attempt, len(missing), missing[:9])})
    return Parts(
        folder=folder,
        images=images,
        batch_size=batch_size,
        rank=launch.rank,
        world_size=launch.world_size,
        file=folder / f"part-{attempt}-{launch.rank}.jsonl",
        missing=missing,
    )


def num_batches(images: ImageSequence, batch_size: int) -> int:
    """Number of batches of all images; the last one may be smaller."""
    return -(-len(images) // batch_size)


def _create(folder: Path, job: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / JOB
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(job))
        return
    try:
        before = json.loads(path.read_text())
    except ValueError:
        before = {}
    if different := [key for key in job if before.get(key) != json.loads(json.dumps(job[key]))]:
        raise PartsError(
            f"{folder} has the parts of another run, which differs in {', '.join(different)}: run that again to "
            "finish it, or remove the folder, or give another output"
        )


def _check_shared(folder: Path) -> None:
    if not (folder / JOB).exists():
        raise PartsError(f"{folder} is not the same folder for all processes: write to one that all machines share")


def predict_own(
    parts: Parts,
    model: ModelSource,
    options: InferenceOptions,
    *,
    topk: int,
    calibrated: bool = False,
    abstain_below: float | None = None,
    progress: Callable[[Prediction], None] = lambda prediction: None,
) -> None:
    """Compute the batches of this process; the options are those of `localvit.predict`, and it raises as that does."""
    try:
        order = [index for batch in parts.own for index in parts.indices(batch)]
        predictions: Iterator[Prediction] = iter(())
        if order:
            images = _Selection(parts.images, order)
            predictions = predict(
                model, images, options=options, topk=topk, calibrated=calibrated, abstain_below=abstain_below
            )
        _write_own(parts, predictions, progress)
    except Exception as error:
        (parts.folder / f"failed-{parts.rank}").write_text(
            f"{type(error).__name__}: {error}", errors="backslashreplace"
        )
        raise
    (parts.folder / f"done-{parts.rank}").touch()


def _write_own(parts: Parts, predictions: Iterator[Prediction], progress: Callable[[Prediction], None]) -> None:
    with parts.file.open("w", encoding="utf-8") as file:
        for batch in parts.own:
            rows = []
            for _ in parts.indices(batch):
                rows.append(next(predictions))
                progress(rows[-1])
            file.write(json.dumps({"batch": batch, "predictions": [asdict(row) for row in rows]}) + "\n")
            file.flush()


def wait_for_others(parts: Parts) -> None:
    """Wait until every process has no batch left. If one is killed, torchrun ends the others, and so this wait.

    Raises PartsError if a process failed.
    """
    waiting = set(range(parts.world_size))
    while waiting := {rank for rank in waiting if not (parts.folder / f"done-{rank}").exists()}:
        for rank in waiting:
            if (failed := parts.folder / f"failed-{rank}").exists():
                reason = failed.read_text(errors="replace")
                raise PartsError(f"process {rank} of {parts.world_size} failed: {reason}; run the command again")
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def merged(parts: Parts) -> Iterator[Prediction]:
    """All predictions in the order of the images, in bounded memory. Raises PartsError if one is missing."""
    places: dict[int, tuple[Path, int]] = {}
    for path in _files(parts.folder):
        places |= {batch: (path, offset) for batch, offset in _lines(path)}
    for batch in range(num_batches(parts.images, parts.batch_size)):
        if batch not in places:
            raise PartsError(f"{parts.folder} lacks batch {batch}: run the command again")
        path, offset = places[batch]
        with path.open("rb") as file:
            file.seek(offset)
            rows = json.loads(file.readline())["predictions"]
        for row in rows:
            fields: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in row.items()
            }
            yield Prediction(**fields)


def remove_parts(parts: Parts) -> None:
    """Remove the folder's files, and the folder if nothing else is in it."""
    for path in [*_files(parts.folder), *(path for name in _ENDS for path in parts.folder.glob(f"{name}-*"))]:
        path.unlink(missing_ok=True)
    (parts.folder / JOB).unlink(missing_ok=True)
    if not any(parts.folder.iterdir()):
        parts.folder.rmdir()


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.jsonl"))


def _lines(path: Path) -> Iterator[tuple[int, int]]:
    """Number and offset in bytes of each complete batch in a file; a last line that was cut off does not count."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)["batch"], offset
            offset += len(line)


class _Selection(ImageSequence):
    """Some images of a sequence, in an order."""

    def __init__(self, images: ImageSequence, order: Sequence[int]) -> None:
        self.images, self.order, self.root = images, order, images.root

    def load(self, index: int) -> Image.Image:
        return self.images.load(self.order[index])

    def name(self, index: int) -> str:
        return self.images.name(self.order[index])

    def __len__(self) -> int:
        return len(self.order)
