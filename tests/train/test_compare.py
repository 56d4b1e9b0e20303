"""Comparing runs: reading their folders, settings that differ, and means over seeds."""

from pathlib import Path

import numpy as np
import pytest

from localvit.train.compare import differing_settings, group_by_settings, groups, read_runs
from run_folders import log_row, write_run

MEASURED = {"seconds": 61.0, "images_per_second": 17.0, "peak_memory_mb": 5.0, "skipped_steps": 1}


@pytest.mark.parametrize(
    ("paths", "error", "words"),
    [
        (["missing"], FileNotFoundError, "missing: no such folder"),
        (["run/log.txt"], ValueError, "is a file; give the folder"),
        (["."], ValueError, "is a folder of runs"),
        (["run", "other/../run"], ValueError, "is given twice"),
        (["no_log"], ValueError, "is not a training log"),
        (["other_log"], ValueError, "log.txt is not a training log: line 2 has no test_loss, n_parameters"),
        (["a_list"], ValueError, "line 1 has no epoch"),
        (["bad_metrics"], ValueError, r"metrics.csv does not contain the numbers of a run: could not convert .*'many'"),
        (["other_metrics"], ValueError, "metrics.csv does not contain the numbers of a run"),
        (["bad_config"], ValueError, "config.yaml is not the config of a run: it has no number of epochs"),
        (["no_config"], ValueError, "config.yaml must contain one setting per line"),
    ],
)
def test_errors_name_the_folder_and_the_cause(tmp_path, monkeypatch, paths, error, words):
    write_run(tmp_path / "run", [30.0])
    (tmp_path / "other").mkdir()
    for name, file, text in (
        ("no_log", "log.txt", "epoch 1\n"),
        ("other_log", "log.txt", '{"epoch": 1, "train_loss": 1, "test_acc1": 3}\n'),
        ("a_list", "log.txt", "[1]\n"),
        ("bad_metrics", "metrics.csv", "epoch,seconds\n0,many\n"),
        ("other_metrics", "metrics.csv", "step,seconds\n0,3\n"),
        ("bad_config", "config.yaml", "lr: 3\n"),
        ("no_config", "config.yaml", "- 3\n"),
    ):
        with (write_run(tmp_path / name, [30.0]) / file).open("a" if name == "other_log" else "w") as stream:
            stream.write(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        read_runs([Path(path) for path in paths])


def test_rows_of_the_log_are_merged_with_metrics(tmp_path):
    write_run(tmp_path / "a" / "s0", [30.0, 50.0, 40.0], metrics=MEASURED)
    write_run(tmp_path / "b" / "s0", [30.0, 50.0])
    (tmp_path / "b" / "s0" / "config.yaml").unlink()
    runs = read_runs([tmp_path / "a" / "s0", tmp_path / "b" / "s0"])
    assert [run.name for run in runs] == ["a/s0", "b/s0"]
    assert runs[0].rows == [
        MEASURED | log_row(epoch, acc, 2 - acc / 100) for epoch, acc in enumerate((30.0, 50.0, 40.0))
    ]
    result = runs[0].result
    assert (result.best["epoch"], result.last["test_acc1"], result.seconds) == (1, 40.0, 183.0)
    assert runs[1].result.seconds is None
    assert runs[1].settings is None
    assert [run.name for run in read_runs([tmp_path / "a" / "s0"])] == ["s0"]


def test_an_incomplete_time_is_none(tmp_path):
    folder = write_run(tmp_path, [30.0, 50.0], metrics=MEASURED)
    with (folder / "metrics.csv").open() as file:
        lines = file.readlines()
    (folder / "metrics.csv").write_text("".join(lines[:-1]))  # the run was killed just before it
    (run,) = read_runs([folder])
    assert run.result.seconds is None
    assert run.result.last["epoch"] == 1


@pytest.mark.parametrize(
    ("accuracies", "settings", "state"),
    [
        ([], {}, "no epoch yet"),
        ([30.0, 40.0], {}, "unfinished"),
        ([30.0, 40.0, 35.0], {}, "done"),
        ([30.0, 40.0, 35.0, 36.0], {"epochs": 9, "early_stopping": 2}, "stopped early"),
        ([30.0, 40.0, 35.0, 41.0], {"epochs": 9, "early_stopping": 2}, "unfinished"),
    ],
)
def test_state_of_a_run(tmp_path, accuracies, settings, state):
    (run,) = read_runs([write_run(tmp_path / "run", accuracies, **settings)])
    assert run.state == state


def test_state_without_settings_is_unknown(tmp_path):
    (write_run(tmp_path, [30.0]) / "config.yaml").unlink()
    assert read_runs([tmp_path])[0].state == "?"


def test_an_empty_log_is_a_run_without_an_epoch(tmp_path):
    (write_run(tmp_path, []) / "log.txt").touch()
    assert read_runs([tmp_path])[0].state == "no epoch yet"


def test_differing_settings(tmp_path):
    folders = [
        write_run(tmp_path / "a", [30.0], lr=0.1, model_args={"depthwise": False, "act": "hs"}),
        write_run(tmp_path / "b", [30.0], lr=0.1, model_args={"act": "hs"}, seed=2),
        write_run(tmp_path / "c", [30.0]),
    ]
    (folders[2] / "config.yaml").unlink()
    assert differing_settings(read_runs(folders)) == ["seed", "model_args.depthwise"]
    assert differing_settings(read_runs(folders[:1])) == []


def test_means_over_seeds(tmp_path):
    accuracies = {"s0": [71.5, 70.25], "s1": [60.0, 74.0], "s2": [72.0, 73.0]}
    folders = [
        write_run(tmp_path / f"local-{name}", values, epochs=2, seed=seed, workers=seed)
        for seed, (name, values) in enumerate(accuracies.items())
    ]
    folders += [
        write_run(tmp_path / "plain-s0", [50.0, 51.0], epochs=2, model_args={"local_blocks": []}),
        write_run(tmp_path / "local-s3", [90.0], epochs=2, seed=3),
        write_run(tmp_path / "copy", [99.0, 99.0], epochs=2, seed=1),
    ]
    runs = read_runs(folders)
    (group,) = groups(runs)
    assert [run.name for run in group.runs] == ["local-s0", "local-s1", "local-s2"]
    assert group.left_out == {"local-s3": "unfinished", "copy": "seed 1 is repeated"}
    assert group.name == "local-s0, local-s1, local-s2"  # local-* would include another run
    for mean_std, values in (
        (group.best_acc1, [71.5, 74.0, 73.0]),
        (group.last_acc1, [70.25, 74.0, 73.0]),
        (group.last_loss, [2 - 0.7025, 2 - 0.74, 2 - 0.73]),
    ):
        # Means of three numbers, summed in another order
        assert mean_std.mean == pytest.approx(np.mean(values), rel=1e-12)
        assert mean_std.std == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    assert [[run.name for run in same] for same in group_by_settings(runs)] == [
        ["local-s0", "local-s1", "local-s2", "local-s3", "copy"],
        ["plain-s0"],
    ]
    assert groups(read_runs(folders[:3]))[0].name == "local-s*"
    assert groups(runs[:1]) == groups(runs[2:4]) == []


def test_runs_without_settings_are_not_grouped(tmp_path):
    folders = [write_run(tmp_path / name, [50.0, 51.0, 52.0]) for name in "ab"]
    for folder in folders:
        (folder / "config.yaml").unlink()
    runs = read_runs(folders)
    assert groups(runs) == []
    assert len(group_by_settings(runs)) == 2
