"""Trackers: what they write, read by the tools for it; after a resume; and when something fails."""

import csv
import json
import math
import struct
import sys
import types

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from localvit.train.config import TrainConfig
from localvit.train.trackers import Trackers
from run_folders import log_row

MEASURED = {"seconds": 12.5, "images_per_second": 101.0, "peak_memory_mb": 7.5, "skipped_steps": 0}


def config(folder, **settings):
    return TrainConfig(output_dir=folder / "run", **settings)


def finish_epoch(trackers, folder, rows, step):
    """Log an epoch as the loop does."""
    log = folder / "run" / "log.txt"
    log.write_text("".join(json.dumps({key: row[key] for key in log_row(0, 0.0)}) + "\n" for row in rows))
    trackers.log_epoch(rows, step)


def test_metrics_are_rewritten_with_all_rows(tmp_path):
    rows = [log_row(epoch, 30.0 + epoch / 3) | MEASURED for epoch in range(3)]
    rows[1]["test_loss"] = math.nan
    rows[2]["skipped_steps"] = 5
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("epoch\n" * 9)  # of the epochs after the one resumed from
    trackers = Trackers(config(tmp_path), from_step=7)
    finish_epoch(trackers, tmp_path, rows, 22)
    trackers.close()
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        read = [{key: float(text) for key, text in row.items()} for row in csv.DictReader(file)]
    assert [list(row) for row in read] == [list(row) for row in rows]
    # Compared as text, because NaN is not equal to itself.
    assert [list(map(str, row.values())) for row in read] == [[str(float(each)) for each in r.values()] for r in rows]
    with Image.open(tmp_path / "run" / "curves.png") as image:
        assert image.size == (1350, 540)


def scalars(folder):
    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_after_a_resume(tmp_path):
    asked = config(tmp_path, tensorboard=True)
    killed = Trackers(asked, from_step=0)
    for step in range(1, 8):
        killed.log_step(step, {"train/loss": 1 / step, "train/lr": 1e-3})
    rows = [log_row(0, 40.0) | MEASURED]
    finish_epoch(killed, tmp_path, rows, 5)  # as an epoch of five steps would; never closed

    resumed = Trackers(asked, from_step=5)
    for step in range(6, 10):
        resumed.log_step(step, {"train/loss": 100 + step, "train/lr": 1e-4})
    rows.append(log_row(1, 50.0) | MEASURED)
    finish_epoch(resumed, tmp_path, rows, 10)
    resumed.close()

    read = scalars(tmp_path)
    # Event files hold float32.
    expected = [(step, pytest.approx(1 / step if step <= 5 else 100 + step, rel=2**-23)) for step in range(1, 10)]
    assert read["train/loss"] == expected
    assert read["epoch/test_acc1"] == [(5, 40.0), (10, 50.0)]
    assert read["epoch/seconds"] == [(5, 12.5), (10, 12.5)]
    assert read.keys() == {"train/loss", "train/lr"} | {
        f"epoch/{key}" for key in rows[0] if key not in ("epoch", "n_parameters")
    }


def test_without_matplotlib_there_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("localvit.train.curves", "matplotlib.figure", "matplotlib.axes", "matplotlib.ticker"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    trackers = Trackers(config(tmp_path), from_step=0)
    for epochs in (1, 2):
        finish_epoch(trackers, tmp_path, [log_row(epoch, 40.0) for epoch in range(epochs)], epochs)
    trackers.close()
    (message,) = caplog.messages
    assert "curves.png" in message
    assert 'pip install "localvit[plot]"' in message
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 3
    assert not (tmp_path / "run" / "curves.png").exists()


# An earlier run's folder called wandb is a module without anything in it.
@pytest.mark.parametrize("wandb", [None, types.ModuleType("wandb")], ids=["missing", "a folder"])
def test_missing_wandb_is_an_error_before_training(tmp_path, monkeypatch, wandb):
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ImportError, match=r'pip install "localvit\[wandb\]"'):
        Trackers(config(tmp_path, wandb="trials"), from_step=0)


def test_missing_tensorboard_is_an_error_before_training(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "localvit\[tensorboard\]"'):
        Trackers(config(tmp_path, tensorboard=True), from_step=0)


def test_a_folder_that_cannot_be_created_is_an_error_before_training(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(FileExistsError, match="run"):
        Trackers(config(tmp_path), from_step=0)


def test_a_failing_tracker_is_turned_off_with_one_warning(tmp_path, caplog):
    trackers = Trackers(config(tmp_path), from_step=0)
    (tmp_path / "run" / "metrics.csv").mkdir()  # nothing can take its name
    for epochs in (1, 2):
        finish_epoch(trackers, tmp_path, [log_row(epoch, 40.0) for epoch in range(epochs)], epochs)
    trackers.close()
    (message,) = caplog.messages
    assert message.startswith("metrics.csv is turned off for the rest of the run: ")
    assert (tmp_path / "run" / "curves.png").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_full_disk_turns_trackers_off_but_does_not_stop_the_run(tmp_path, caplog):
    resource = pytest.importorskip("resource", reason="this system has no limits of file sizes")
    trackers = Trackers(config(tmp_path, tensorboard=True), from_step=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # bytes a file
    try:
        rows = []
        for epoch in range(3):
            for step in range(200):
                trackers.log_step(200 * epoch + step, {"train/loss": 1.0})
            rows.append(log_row(epoch, 40.0))
            finish_epoch(trackers, tmp_path, rows, 200 * (epoch + 1))
        trackers.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(each.split(" is turned off")[0] for each in caplog.messages) == ["TensorBoard", "curves.png"]
    assert all("File too large" in each for each in caplog.messages)
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 4


def records(file):
    """The records of a .wandb file: 7 bytes, then for each a checksum, its length, a 1 for a whole one, and itself."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place = file.read_bytes(), 7
    while place < len(content):
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        assert kind == 1
        yield Record.FromString(content[place + 7 : place + 7 + length])
        place += 7 + length


def test_wandb_continues_under_the_same_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    asked = config(tmp_path, wandb="trials", seed=3)
    kept = {}
    for start in (0, 3):
        trackers = Trackers(asked, from_step=start)
        trackers.log_step(start + 1, {"train/loss": 1 / (start + 1)})
        finish_epoch(trackers, tmp_path, [log_row(0, 40.0)], start + 2)
        trackers.close()
        kept[start] = (tmp_path / "run" / "wandb-id.txt").read_text()
    assert kept[0] == kept[3]

    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{kept[0]}.wandb"))
    assert len(files) == 2
    for start, file in zip((0, 3), files, strict=True):
        history, run_ids, seeds = [], set(), set()
        for record in records(file):
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                history.append({key: json.loads(text) for key, text in items.items()})
            if record.HasField("run"):
                run_ids.add(record.run.run_id)
                seeds |= {each.value_json for each in record.run.config.update if each.key == "seed"}
        assert run_ids == {kept[0]}
        assert seeds == {"3"}
        assert [(row["step"], row.get("train/loss"), row.get("epoch/test_acc1")) for row in history] == [
            (start + 1, 1 / (start + 1), None),
            (start + 2, None, 40.0),
        ]
    Trackers(asked, from_step=0).close()
    assert (tmp_path / "run" / "wandb-id.txt").read_text() != kept[0]  # a new run
