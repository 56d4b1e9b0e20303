"""Plots of runs."""

import importlib
import json
import math
import re
import sys

import pytest
from PIL import Image

from localvit.train.curves import draw_comparison, draw_curves, draw_study
from run_folders import log_row


@pytest.mark.parametrize("epochs", [1, 3, 60])
def test_curves_of_a_log(tmp_path, epochs):
    log = tmp_path / "log.txt"
    log.write_text("".join(json.dumps(log_row(epoch, 60.0)) + "\n" for epoch in range(epochs)))
    with Image.open(draw_curves(log, tmp_path / "new" / "curves.png")) as image:
        assert image.size == (1350, 540)
        red = image.convert("RGB").getcolors(image.width * image.height)
    assert any(color == (192, 57, 43) for _, color in red)  # the validation curve is there


def test_nonfinite_losses_leave_a_gap(tmp_path):
    log = tmp_path / "log.txt"
    rows = [log_row(0, 10.0), log_row(1, 10.0, math.nan), log_row(2, 10.0, math.inf), log_row(3, 10.0)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Image.open(draw_curves(log, tmp_path / "curves.png")) as image:
        assert image.size == (1350, 540)


@pytest.mark.parametrize(("text", "words"), [("", "no finished epoch"), ("epoch 1\n", "is not a training log")])
def test_other_files_than_logs_are_refused(tmp_path, text, words):
    log = tmp_path / "log.txt"
    log.write_text(text)
    with pytest.raises(ValueError, match=words):
        draw_curves(log, tmp_path / "curves.png")


@pytest.mark.parametrize(
    ("ending", "beginning"), [(".png", b"\x89PNG"), (".PNG", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")]
)
def test_the_suffix_determines_the_format(tmp_path, ending, beginning):
    log = tmp_path / "log.txt"
    log.write_text(json.dumps(log_row(0, 60.0)) + "\n")
    assert draw_curves(log, tmp_path / f"curves{ending}").read_bytes().startswith(beginning)


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"runs.gif must end in .png, .svg, .pdf"):
        draw_comparison({"run": [[log_row(0, 60.0)]]}, tmp_path / "runs.gif")


def lines(svg):
    """Color and dashes of each curve."""
    styles = re.findall(r'<path d="M[^"]*" clip-path="[^"]*" style="([^"]*)"', svg)
    curves = [style for style in styles if "#e6e9ec" not in style]  # without the grid
    return [(re.search("stroke: (#......)", s)[1], *re.findall("stroke-dasharray: ([^;]*)", s)) for s in curves]


@pytest.mark.parametrize("count", [1, 3, 12])
def test_each_run_has_its_own_line_in_both_panels(tmp_path, count):
    runs = {f"run{i}": [[log_row(epoch, 30.0 + epoch + i) for epoch in range(5)]] for i in range(count)}
    svg = draw_comparison(runs, tmp_path / "runs.svg").read_text()
    styles = lines(svg)
    assert len(styles) == 2 * count
    assert all(styles.count(style) == 2 for style in styles)
    # The legend, best first: matplotlib leaves the text of each label as a comment.
    assert re.findall(r"<!-- (run\d+: [\d.]+) -->", svg) == [f"run{i}: {34 + i:.2f}" for i in reversed(range(count))]


def test_runs_with_the_same_name_share_a_line_style(tmp_path):
    logs = [[log_row(epoch, 30.0 + epoch + seed) for epoch in range(3)] for seed in range(3)]
    svg = draw_comparison({"local": logs, "plain": logs[:1]}, tmp_path / "runs.svg").read_text()
    assert sorted(map(lines(svg).count, set(lines(svg)))) == [2, 6]
    assert "<!-- local: 32.00 to 34.00 (3 runs) -->" in svg


@pytest.mark.parametrize(
    ("accuracies", "lowest", "highest"),
    [([60.0, 60.1], 58, 62), ([99.9, 100.0], 98, 100), ([0.1, 0.3], 0, 2), ([10.0, 90.0], 6, 94)],
)
def test_the_accuracy_axis_shows_at_least_four_points(tmp_path, accuracies, lowest, highest):
    log = tmp_path / "log.txt"
    log.write_text("".join(json.dumps(log_row(epoch, acc1)) + "\n" for epoch, acc1 in enumerate(accuracies)))
    svg = draw_curves(log, tmp_path / "curves.svg").read_text()
    texts = re.findall("<!-- ([\N{MINUS SIGN}\\d.]+) -->", svg.split('<g id="axes_2">')[1])
    labels = [float(text.replace("\N{MINUS SIGN}", "-")) for text in texts]
    ticks = labels[2:]  # the first two belong to the other axis: epochs 1 and 2
    assert max(0, lowest - 0.2) <= min(ticks) < max(ticks) <= min(100, highest + 0.2)
    assert max(ticks) - min(ticks) >= 0.6 * (highest - lowest)


@pytest.mark.parametrize(("count", "words"), [(0, "no finished epoch"), (29, "at most 28 lines, not 29")])
def test_too_few_and_too_many_runs(tmp_path, count, words):
    with pytest.raises(ValueError, match=words):
        draw_comparison({str(i): [[log_row(0, 60.0)]] for i in range(count)}, tmp_path / "runs.png")


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    for name in ("localvit.train.curves", "matplotlib.axes", "matplotlib.figure", "matplotlib.ticker"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "localvit\[plot\]"'):
        importlib.import_module("localvit.train.curves")


@pytest.mark.parametrize(("lengths", "panels"), [((3,), 1), ((2, 3), 2)])
def test_the_ends_of_schedules_have_a_panel_where_there_are_several(tmp_path, lengths, panels):
    by_epoch = {"local": [[50.0, 60.0, 70.0]], "plain": [[40.0, 45.0, 47.0]]}
    at_end = {arm: [(length, runs[0][length - 1]) for length in lengths] for arm, runs in by_epoch.items()}
    svg = draw_study(by_epoch, at_end, tmp_path / "study.svg").read_text()
    assert svg.count('<g id="axes_') == panels
