"""The processes that look at images: their number changes nothing, and they end without noise."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from data_sets import found, save, scene, several
from PIL import ImageEnhance

from localvit.dataset_check.report import check_folder


def test_any_number_of_workers_tells_the_same(root):
    several(root, "train/ape", 41)
    save(root / "val/bat/x.bmp", scene(0))
    save(root / "val/ape/x.jpg", ImageEnhance.Brightness(scene(1)).enhance(0.9))
    (root / "val/ape/broken.png").write_bytes(b"")
    alone, together = (check_folder(root, workers=workers) for workers in (0, 3))
    assert alone.to_dict() == together.to_dict()
    assert found(alone).keys() == {"unreadable", "same-across-splits", "imbalance", "near-across-splits"}


def test_progress_counts_every_image_once(root):
    several(root, "train/ape", 33)
    save(root / "train/bat/x.png", scene(2))
    told = {}

    class Account:
        def __init__(self, title, total):
            told[title] = [total]
            self.title = title

        def __enter__(self):
            return told[self.title].append

        def __exit__(self, *_):
            pass

    check_folder(root / "train", progress=Account)
    assert {title: (total, sum(done)) for title, (total, *done) in told.items()} == {
        "look": (38, 38),
        "compare": (37, 37),
    }


def when_a_worker_waits(act: Callable[[int], None], pipe: Path) -> threading.Thread:
    """Call `act` with the id of the worker process that waits for the pipe to be written to."""

    def wait() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.01)
        (worker,) = multiprocessing.active_children()
        while True:  # a pipe can be opened for writing once it is read
            try:
                writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
                break
            except OSError:
                time.sleep(0.01)
        act(worker.pid)
        time.sleep(0.2)  # so that the worker learns of what happened before it reads on
        os.close(writer)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.fixture
def waiting(root) -> Path:
    """A data set whose decoding waits at a pipe that is called an image."""
    os.mkfifo(root / "train" / "ape" / "waits.png")
    return root


def test_a_dying_worker_is_told(waiting):
    thread = when_a_worker_waits(lambda worker: os.kill(worker, signal.SIGKILL), waiting / "train/ape/waits.png")
    with pytest.raises(RuntimeError, match="died"):
        check_folder(waiting, workers=1)
    thread.join()


def test_an_interrupt_ends_the_workers_quietly(waiting, capfd):
    def interrupt(worker: int) -> None:
        os.kill(worker, signal.SIGINT)  # a terminal sends Ctrl-C to all processes
        os.kill(os.getpid(), signal.SIGINT)

    thread = when_a_worker_waits(interrupt, waiting / "train/ape/waits.png")
    with pytest.raises(KeyboardInterrupt):
        check_folder(waiting, workers=1)
    thread.join()
    assert multiprocessing.active_children() == []
    assert capfd.readouterr() == ("", "")
