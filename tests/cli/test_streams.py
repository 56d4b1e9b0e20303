"""Commands whose standard output or standard error is closed, full, without a reader, or cannot encode a text."""

import os
import subprocess
import sys

import pytest

from localvit_cli import run
from localvit_cli.streams import printable, printable_lines
from processes import run_source, start, status_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the shell and the devices of Unix")

WORK = """
import logging, multiprocessing, sys, time, warnings
from pathlib import Path
from localvit_cli import run
from localvit_cli.console import progress

def work():
    file = open(sys.argv[1], "w")  # takes the lowest free descriptor
    logger = logging.getLogger("localvit")
    with progress("work", 300) as advance:
        for _ in range(300):
            logger.warning("a message of several words, repeated until no pipe holds all of them " * 4)
            advance(1)
    warnings.warn("from a library")
    print("result", flush=True)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
    child.start()  # flushes both streams
    child.join()
    file.write("finished")
    file.close()
    return 3

sys.exit(run(work, debug=False))
"""


ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def shell(redirections: str, program: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run Python source in a shell, with these redirections of its streams."""
    command = ["sh", "-c", f'"$0" -c "$@" {redirections}', sys.executable, program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=100)


@pytest.mark.parametrize(
    ("redirections", "out"),
    [
        ("2>&1 >&3 | head -1 >&2", b"result\n"),
        ("2>&-", b"result\n"),
        ("2>/dev/full", b"result\n"),
        ("<&- 2>&-", b"result\n"),
        (">&-", b""),
        (">&- 2>&-", b""),
    ],
)
def test_work_is_finished_whatever_standard_error_is(tmp_path, redirections, out):
    """And whatever is closed, no message goes into a file or to standard output."""
    if "|" in redirections:  # the status is that of the command, not that of `head`
        redirections = f"2>&1 >&3 3>&- | head -1 >&2; }} 3>&1; exit $(cat {tmp_path}/status)"
        command = f'{{ {{ "$0" -c "$@"; echo $? >{tmp_path}/status; }} {redirections}'
        arguments = ["sh", "-c", command, sys.executable, WORK, str(tmp_path / "file")]
        done = subprocess.run(arguments, capture_output=True, env=ENVIRONMENT, timeout=100)
    else:
        done = shell(redirections, WORK, tmp_path / "file")
    assert (done.returncode, done.stdout) == (3, out), done.stderr
    assert (tmp_path / "file").read_text() == "finished"


def test_a_full_standard_output_is_an_error_of_one_line():
    program = "import sys; from localvit_cli import run; sys.exit(run(lambda: print('result'), debug=False))"
    done = shell(">/dev/full", program)
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert line == "localvit: error: standard output cannot be written: No space left on device"


def test_help_for_a_reader_that_stops_early_is_not_an_error():
    program = "import sys; from localvit_cli import main; sys.exit(main(['--help']))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, env=ENVIRONMENT)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_another_broken_pipe_is_an_error(capsys):
    def lose_a_worker() -> None:
        reading, writing = os.pipe()
        os.close(reading)
        try:
            os.write(writing, b"batch")
        finally:
            os.close(writing)

    assert run(lose_a_worker, debug=False) == 1
    assert "Broken pipe" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_text_that_the_encoding_lacks_is_escaped(encoding, tmp_path):
    program = r"""
import logging, sys
from localvit_cli import run
for stream in (sys.stdout, sys.stderr):  # as PYTHONIOENCODING does
    stream.reconfigure(encoding=sys.argv[1], errors="strict")
def work():
    logging.getLogger("localvit").info("caf\u00e9 \u4e2d \udcff")
    print("caf\u00e9 \u4e2d \udcff")
    raise ValueError("\u4e2d \udcff")
sys.exit(run(work, debug=False))
"""
    out, err = tmp_path / "out", tmp_path / "err"
    status = status_of(start(run_source, program, encoding, out=out, err=err))
    cafe = "caf\xe9".encode(encoding, "backslashreplace")
    assert out.read_bytes() == cafe + b" \\u4e2d \\udcff\n"
    assert err.read_bytes() == cafe + b" \\u4e2d \\udcff\nlocalvit: error: \\u4e2d \\udcff\n"
    assert status == 1


def test_messages_cannot_control_a_terminal(capsys):
    def fail() -> None:
        raise ValueError("the class \x1b[31mred\r is \x07\x9b2J empty:\nsecond line [red]x[/red]")

    assert run(fail, debug=False) == 1
    err = capsys.readouterr().err
    assert err == "localvit: error: the class \\x1b[31mred\\r is \\x07\\x9b2J empty:\nsecond line [red]x[/red]\n"
    assert printable("a\nb\u202e") == "a\\nb\\u202e"
    assert printable_lines("a\nb\t中") == "a\nb\\t中"
