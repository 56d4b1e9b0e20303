"""Worker processes: their number does not change the report, and they stop without tracebacks."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from data_sets import found, save, scene, several
from PIL import ImageEnhance

from localvit.dataset_check.report import check_folder
from waiting_images import waiting_format


def test_the_number_of_workers_does_not_change_the_report(root):
    several(root, "train/ape", 41)
    save(root / "val/bat/x.bmp", scene(0))
    save(root / "val/ape/x.jpg", ImageEnhance.Brightness(scene(1)).enhance(0.9))
    (root / "val/ape/broken.png").write_bytes(b"")
    without, with_workers = (check_folder(root, workers=workers) for workers in (0, 3))
    assert without.to_dict() == with_workers.to_dict()
    assert found(without).keys() == {"unreadable", "same-across-splits", "imbalance", "near-across-splits"}


def test_progress_counts_each_image_once(root):
    several(root, "train/ape", 33)
    save(root / "train/bat/x.png", scene(2))
    counts = {}

    class Progress:
        def __init__(self, title, total):
            counts[title] = [total]
            self.title = title

        def __enter__(self):
            return counts[self.title].append

        def __exit__(self, *_):
            pass

    check_folder(root / "train", progress=Progress)
    assert {title: (total, sum(done)) for title, (total, *done) in counts.items()} == {
        "inspect": (38, 38),
        "compare": (37, 37),
    }


def when_a_worker_waits(act: Callable[[int], None], pipe: Path) -> threading.Thread:
    """Call `act` with the id of the worker process that waits for data from the pipe."""

    def wait() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.01)
        (worker,) = multiprocessing.active_children()
        while True:  # a pipe can be opened for writing once a reader has opened it
            try:
                writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
                break
            except OSError:
                time.sleep(0.01)
        act(worker.pid)
        time.sleep(0.2)  # so that the signal reaches the worker before it continues reading
        os.close(writer)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.fixture
def pipe(root, tmp_path) -> Iterator[Path]:
    """A named pipe for which the decoder of one image waits."""
    with waiting_format(tmp_path / "pipe") as content:
        (root / "train" / "ape" / "waits.png").write_bytes(content)
        yield tmp_path / "pipe"


def test_a_killed_worker_raises_an_error(root, pipe):
    thread = when_a_worker_waits(lambda worker: os.kill(worker, signal.SIGKILL), pipe)
    with pytest.raises(RuntimeError, match="died"):
        check_folder(root, workers=1)
    thread.join()


def test_an_interrupt_stops_the_workers_without_output(root, pipe, capfd):
    def interrupt(worker: int) -> None:
        os.kill(worker, signal.SIGINT)  # a terminal sends Ctrl-C to all processes
        os.kill(os.getpid(), signal.SIGINT)

    thread = when_a_worker_waits(interrupt, pipe)
    with pytest.raises(KeyboardInterrupt):
        check_folder(root, workers=1)
    thread.join()
    assert multiprocessing.active_children() == []
    assert capfd.readouterr() == ("", "")
