"""The command line answers at once: help needs neither torch nor timm."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from localvit_cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert stop.code == 0, stop.code
heavy = {"torch", "torchvision", "timm", "numpy", "PIL", "localvit"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([name, "--help"] for name in ("predict", "models", "info", "check-data", "compare", "bench"))],
)
def test_help_imports_nothing_heavy(arguments):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("models", "info") if arguments == ["--help"] else (arguments[0],):
        assert word in done.stdout
