"""How the command line starts: help, version, mistyped commands, and what is imported when."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

import localvit_cli
from localvit.train import TrainConfig
from localvit_cli import COMMANDS, main

# Commands import torch and timm, which takes seconds; help must not wait for them.
PROGRAM = """
import sys
from localvit_cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
heavy = {"torch", "torchvision", "timm", "numpy", "PIL", "localvit"} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--version"], 0), (["trian"], 2), ([], 2)])
def test_no_command_imports_nothing_heavy(arguments, status):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)
    assert done.returncode == status, done.stderr


def exit_of(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def test_help_lists_every_command_within_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = exit_of(capsys, "--help")
    assert (status, err) == (0, "")
    for name, summary in COMMANDS.items():
        assert f"  {name} " in out
        assert summary in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_fits_80_columns(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = exit_of(capsys, name, "--help")
    assert (status, err) == (0, "")
    assert f"usage: localvit {name}" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_help_of_train_describes_each_group_of_settings(capsys, monkeypatch):
    """In the words of `TrainConfig`, also with a recipe's defaults."""
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = exit_of(capsys, "train", "--recipe", "digits", "--help")
    for group in TrainConfig.__bases__:
        assert group.__doc__ in out
    assert "model_construct" not in out


def test_version(capsys):
    assert exit_of(capsys, "--version") == (0, f"localvit {version('localvit')}\n", "")


def test_a_copy_of_the_source_that_was_never_installed(capsys, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(localvit_cli, "version", missing)
    status, out, err = exit_of(capsys, "--version")
    assert (status, err) == (0, "")
    assert out.startswith("localvit ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "there is no command 'trian'; did you mean train?"),
        (["chekc-data", "photos"], "there is no command 'chekc-data'; did you mean check-data?"),
        (["abacus"], "there is no command 'abacus'; 'localvit --help' lists the commands"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        ([], "no command given; 'localvit --help' lists them"),
    ],
)
def test_bad_usage_is_one_line_with_a_suggestion(capsys, arguments, message):
    status, out, err = exit_of(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == f"localvit: error: {message}"


def test_a_mistyped_flag_suggests_the_flag_and_the_help_of_its_command(capsys):
    status, out, err = exit_of(capsys, "models", "--jsn")
    assert (status, out) == (2, "")
    assert err.count("--json,") == 1
    assert "localvit models --help" in err


def test_a_failure_is_one_line_unless_debug_is_given(capsys):
    assert main(["info", "missing.safetensors"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("localvit: error: ")
    assert "missing.safetensors" in line
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        main(["--debug", "info", "missing.safetensors"])


def test_a_reader_that_stops_early_is_not_an_error():
    """As with `localvit --help | head -n 1`, here for the output of a command."""
    program = """
import sys
from localvit_cli import run
sys.exit(run(lambda: print("line\\n" * 100_000), debug=False))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to a process")
def test_an_interruption_is_one_line():
    program = """
import os, signal
from localvit_cli import run
raise SystemExit(run(lambda: os.kill(os.getpid(), signal.SIGINT), debug=False))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "localvit: interrupted\n")


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "localvit", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"localvit {version('localvit')}\n"), done.stderr
