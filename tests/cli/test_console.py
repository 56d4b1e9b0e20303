"""What a command prints while it works: messages and progress, on standard error, from the first process only."""

import logging

from localvit_cli import UsageError, run
from localvit_cli.console import progress
from terminals import run_on_terminal

library = logging.getLogger("localvit.train.loop")
command = logging.getLogger("localvit_cli.train")


def test_messages_are_lines_on_standard_error_and_warnings_say_so(capsys):
    def log() -> None:
        library.debug("hidden")
        library.info("epoch %d", 3)
        library.warning("no GPU")
        command.info("[0, 1] /a/file.txt")  # rich would read markup into this

    assert run(log, debug=False) == 0
    printed = capsys.readouterr()
    assert printed.err == "epoch 3\nwarning: no GPU\n[0, 1] /a/file.txt\n"
    assert printed.out == ""


def test_messages_come_from_the_first_process_only(capsys, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}.items():
        monkeypatch.setenv(name, value)

    def log() -> None:
        library.warning("no GPU")
        with progress("train", 2) as advance:
            advance(2)

    assert run(log, debug=False) == 0
    assert capsys.readouterr().err == ""


def test_nothing_stays_installed_after_a_command(capsys):
    def fail() -> None:
        raise UsageError("--rounds 0 must be at least 3")

    for _ in range(2):
        assert run(fail, debug=False) == 2
    assert capsys.readouterr().err == "localvit: error: --rounds 0 must be at least 3\n" * 2
    run(lambda: library.info("once"), debug=False)
    assert capsys.readouterr().err == "once\n"
    for name in ("localvit", "localvit_cli"):
        assert not logging.getLogger(name).handlers
        assert logging.getLogger(name).level == logging.NOTSET


PROGRAM = """
import logging
from localvit_cli import run
from localvit_cli.console import progress

def work():
    with progress("train", 2) as advance:
        advance(1, "epoch 1/1")
        print("a result")
        logging.getLogger("localvit").warning("no GPU")
        advance(1, "epoch 1/1")

run(work, debug=False)
"""


def test_the_bar_keeps_messages_readable_and_leaves_redirected_results_alone(tmp_path):
    shown, out = run_on_terminal(PROGRAM, tmp_path, columns=80, outputs=("err",))
    assert out == "a result\n"
    lines = [line for line in shown.replace("\r", "\n").splitlines() if "no GPU" in line]
    assert [line.removeprefix("\x1b[2K") for line in lines] == ["warning: no GPU"]
    assert "2/2" in shown
    assert "epoch 1/1" in shown


def test_progress_in_a_pipe_is_plain_lines(capsys):
    def work() -> None:
        with progress("bench", 3, "rounds") as advance:
            for _ in range(3):
                advance(1, "size 2")

    run(work, debug=False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench size 2: 3 of 3 rounds, ")


def test_progress_counts_the_images_of_all_processes(capsys):
    """201 images on two processes: the first has 101 of them."""

    def work() -> None:
        with progress("eval", 201, processes=2) as advance:
            for done in (64, 37):
                advance(done)

    run(work, debug=False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eval: 201 of 201 images, ")


def test_progress_of_an_unknown_number_of_images(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="localvit_cli")
    monkeypatch.setattr("localvit_cli.console._SECONDS_BETWEEN_LINES", 0)
    with progress("eval", None, processes=2) as advance:
        advance(3)
    assert "eval: 6 images, " in caplog.text
    caplog.clear()
    with progress("eval", 5, processes=2) as advance:  # whose shares differ
        advance(3)
        advance(1)
    assert caplog.text.count("5 of 5") == 1
