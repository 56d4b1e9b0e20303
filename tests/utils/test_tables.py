"""Tables: what fits is left as it is, what does not wraps or moves below, and nothing is lost."""

import os
import random
from collections import Counter
from textwrap import dedent

import pytest
from rich.cells import cell_len

from localvit.utils.tables import format_table
from processes import run_source, start, status_of
from terminals import run_on_terminal

ROWS = [
    ("localvit_tiny", "5,908,696", "1.266 G", "a finding of several words"),
    ("deit", "1", "12.000 G", "another"),
]
HEADINGS = ("name", "parameters", "multiply adds", "finding")


def show(width: int) -> str:
    return format_table(ROWS, headings=HEADINGS, right=(1, 2), width=width)


def expect(text: str) -> str:
    return dedent(text).strip("\n")


def test_a_table_that_fits_is_not_wrapped():
    assert show(200) == expect("""
        name           parameters  multiply adds  finding
        localvit_tiny   5,908,696        1.266 G  a finding of several words
        deit                    1       12.000 G  another
    """)


def test_words_wrap_and_numbers_do_not():
    assert show(50) == expect("""
                                     multiply
        name           parameters        adds  finding
        localvit_tiny   5,908,696     1.266 G  a finding
                                               of several
                                               words
        deit                    1    12.000 G  another
    """)


def test_columns_that_do_not_fit_move_below():
    assert show(40) == expect("""
        name           parameters  multiply adds
        localvit_tiny   5,908,696        1.266 G
        deit                    1       12.000 G

        name           finding
        localvit_tiny  a finding of several
                       words
        deit           another
    """)


def test_no_headings_and_no_rows():
    assert format_table([("a", "bb", "c"), ("aaa", "b", "cc")], right=(1,)) == "a    bb  c\naaa   b  cc"
    assert format_table([], headings=("a", "b")) == "a  b"
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        format_table([("a", "b"), ("c",)])


def test_markup_and_wide_characters_are_text():
    assert format_table([("[red]x[/red]", "猫", ":cat:"), ("y", "a", "b")]).splitlines() == [
        "[red]x[/red]  猫  :cat:",
        "y             a   b",
    ]


@pytest.mark.parametrize("width", [1, 20, 40, 80, 200])
def test_nothing_is_cut_off_and_no_line_is_too_wide(width):
    rng = random.Random(width)
    for _ in range(20):
        words = ["".join(rng.choices("abcdef_0猫", k=rng.randint(1, 25))) for _ in range(50)]
        rows = [[" ".join(rng.sample(words, rng.randint(0, 6))) for _ in range(5)] for _ in range(4)]
        shown = format_table(rows, right=(2,), width=max(width, 8))
        assert max(map(cell_len, shown.splitlines())) <= max(width, 8)
        expected = Counter("".join(cell for row in rows for cell in row))
        del expected[" "]
        missing = expected - Counter(shown)
        assert not missing


PROGRAM = (
    f"from localvit.utils.tables import format_table\nprint(format_table({ROWS}, headings={HEADINGS}, right=(1,)))"
)
LONG = PROGRAM.replace("another", "another " * 20)


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_decides_the_width(tmp_path, columns):
    shown, _ = run_on_terminal(LONG, tmp_path, columns=columns)
    assert columns - 8 <= max(map(len, shown.splitlines())) <= columns  # a word is 8 characters with its space
    assert "\x1b" not in shown


@pytest.mark.parametrize(("environment", "columns"), [({}, 80), ({"COLUMNS": "200"}, 200)])
def test_a_file_has_80_columns_unless_the_environment_gives_another_number(tmp_path, environment, columns):
    others = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    assert status_of(start(run_source, LONG, out=tmp_path / "out", environment=others | environment)) == 0
    shown = (tmp_path / "out").read_text()
    assert columns - 8 <= max(map(len, shown.splitlines())) <= columns
