"""`localvit compare`: in a pipe, on a narrow terminal, as JSON, and as a plot."""

import json
import math
import statistics
import sys
from pathlib import Path

import pytest
from PIL import Image

from localvit_cli import main
from run_folders import write_run

MEASURED = {"seconds": 1831.5, "images_per_second": 1017.25, "peak_memory_mb": 5.0, "skipped_steps": 0}


@pytest.fixture
def folders(tmp_path) -> list[str]:
    """Two seeds of one arm, one of another, a run without a finished epoch, and one of the published program."""
    write_run(tmp_path / "local-s0", [30.0, 50.5, 49.25], metrics=MEASURED)
    write_run(tmp_path / "local-s1", [31.0, 48.0, 51.75], metrics=MEASURED, seed=1)
    write_run(tmp_path / "plain-s0", [20.0, 30.0], model_args={"local_blocks": []}, lr=0.002)
    write_run(tmp_path / "begun", [], seed=5)
    (write_run(tmp_path / "published", [75.0]) / "config.yaml").unlink()
    return [str(tmp_path / name) for name in ("local-s0", "local-s1", "plain-s0", "begun", "published")]


def test_in_a_pipe_each_run_is_one_line(folders, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["compare", *folders]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    results, settings, means, notes = out.split("\n\n")
    rows = [line.split() for line in results.splitlines()]
    assert rows[1] == ["local-s0", "done", "3/3", "50.500", "2", "49.250", "1.5075", "1:31:34", "1,017.2", "731,074"]
    assert rows[3] == ["plain-s0", "unfinished", "2/3", "30.000", "2", "30.000", "1.7000", "-", "-", "731,074"]
    assert rows[4] == ["begun", "no", "epoch", "yet", "0/3", *"-------"]
    assert rows[5][:3] == ["published", "?", "1/?"]
    assert [line.split() for line in settings.splitlines()] == [
        ["run", "lr", "seed", "model_args.local_blocks"],
        ["local-s0", "0.0005", "0", "-"],
        ["local-s1", "0.0005", "1", "-"],
        ["plain-s0", "0.002", "0", "[]"],
        ["begun", "0.0005", "5", "-"],
        ["published", "?", "?", "?"],
    ]
    std = statistics.stdev([50.5, 51.75])
    assert means.splitlines()[1].split()[:5] == ["local-s*", "2", "51.125", "±", f"{std:.3f}"]
    assert "Not included in the means: begun (no epoch yet)." in notes


def test_intervals_are_shown_where_the_number_of_images_is_known(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    small = str(write_run(tmp_path / "small", [100 * 15 / 18], metrics={"test_images": 18}))
    assert main(["compare", folders[0], small]) == 0
    out = capsys.readouterr().out
    assert "95 % interval" in out.splitlines()[0]
    assert "83.333   60.8 to 94.2" in out.splitlines()[2]
    assert "Wilson" in out
    main(["compare", "--json", folders[0], small])
    first, second = json.loads(capsys.readouterr().out)["runs"]
    assert "test_acc1_interval" not in first["last"]
    assert second["last"]["test_acc1_interval"] == pytest.approx([60.78, 94.16], abs=0.01)


def test_on_a_narrow_terminal_nothing_is_cut_off(folders, capsys, monkeypatch):
    main(["compare", *folders])
    words = set(capsys.readouterr().out.split())
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["compare", *folders]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert set(out.split()) == words


def test_json(folders, capsys):
    log = Path(folders[0]) / "log.txt"
    log.write_text(log.read_text().replace('"test_loss": 1.5075', '"test_loss": NaN'))
    assert main(["compare", "--json", *folders]) == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=lambda constant: pytest.fail(constant))
    first, second, third, begun, published = facts["runs"]
    assert (first["name"], first["path"], first["state"]) == ("local-s0", folders[0], "done")
    assert (first["best"]["epoch"], first["best"]["test_acc1"], first["last"]["test_loss"]) == (1, 50.5, None)
    assert first["seconds"] == 3 * 1831.5
    assert second["settings"] == {"lr": 0.0005, "seed": 1}
    assert third["settings"] == {"lr": 0.002, "seed": 0, "model_args.local_blocks": []}
    assert (third["epochs"], third["epochs_to_train"]) == (2, 3)
    assert (begun["state"], begun["epochs"], "best" in begun) == ("no epoch yet", 0, False)
    assert (published["settings"], published["epochs_to_train"]) == (None, None)
    (group,) = facts["groups"]
    assert (group["runs"], group["n"], group["left_out"]) == (["local-s0", "local-s1"], 2, {"begun": "no epoch yet"})
    assert group["best_acc1"] == {"mean": 51.125, "std": pytest.approx(1.25 / math.sqrt(2))}
    assert group["last_loss"] == {"mean": None, "std": None}


def test_a_plot_shows_runs_with_a_finished_epoch(folders, capsys, tmp_path):
    assert main(["compare", *folders, "--plot", str(tmp_path / "new" / "runs.png")]) == 0
    with Image.open(tmp_path / "new" / "runs.png") as image:
        assert image.width == 1500
    main(["compare", *folders, "--plot", str(tmp_path / "runs.svg")])
    svg = (tmp_path / "runs.svg").read_text()
    for label in ("local-s*: 49.25 to 51.75 (2 runs)", "plain-s0: 30.00", "published: 75.00"):
        assert f"<!-- {label} -->" in svg
    assert "begun" not in svg


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "no run given"),
        (["here", "nowhere"], 1, "nowhere: no such folder"),
        (["here", "--plot", "runs.gif"], 2, "runs.gif must end in .png, .svg, .pdf"),
        (["empty", "--plot", "runs.png"], 1, "no finished epoch to plot"),
    ],
)
def test_errors(tmp_path, monkeypatch, capsys, arguments, status, words):
    write_run(tmp_path / "here", [30.0])
    write_run(tmp_path / "empty", [])
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
