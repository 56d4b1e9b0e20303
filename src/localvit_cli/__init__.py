"""The command line: one module per command, imported only when that command is run.

It is a package of its own, so that `localvit --help` does not import torch, as any module of `localvit` would.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import tyro

from localvit_cli.allocator import keep_freed_memory
from localvit_cli.console import log_to_stderr
from localvit_cli.streams import OutputClosed, flushed_output, printable_lines, standard_streams

COMMANDS = {
    "train": "Train a model from a recipe, a settings file and flags.",
    "eval": "Evaluate a model on labeled images.",
    "predict": "Classify images.",
    "explain": "Show what a model looks at, and what locality changes.",
    "check-data": "Find problems in an image folder before training on it.",
    "compare": "Compare training runs.",
    "recipes": "List the training recipes, or print one.",
    "study": "Run what is missing of a study: arms x seeds x schedules.",
    "models": "List the models with their size, cost and published accuracy.",
    "info": "Describe a model, a checkpoint file or an exported file.",
    "export": "Write a model as a file for other runtimes, with proof.",
    "push": "Share a trained model on the Hugging Face Hub.",
    "bench": "Measure speed, latency, memory and cost of models.",
    "demo": "Train a small model on digits, or write a model as a web page.",
}


class UsageError(ValueError):
    """The command line asks for something that makes no sense; the exit status is 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command given by `arguments`, by default those of the process.

    Returns:
        The exit status: 0 for success, 1 for a failure, 2 for bad usage, 130 for an interruption. A failure prints one
        line to standard error; `--debug` shows the traceback instead.

    Raises:
        SystemExit: After `--help` and `--version` (status 0), and when the arguments cannot be parsed (status 2).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]

    def parse_and_run() -> int | None:
        name = _command_name(arguments)
        module = importlib.import_module(f"localvit_cli.{name.replace('-', '_')}")
        if name == "train":  # its defaults depend on the recipe among its arguments
            return module.parse(arguments[1:]).run()
        command: Any = getattr(module, name.title().replace("-", ""))
        return tyro.cli(command, prog=f"localvit {name}", args=arguments[1:]).run()

    return run(parse_and_run, debug=debug)


def _command_name(arguments: Sequence[str]) -> str:
    """The command that `arguments` start with. Exits for `--help`, `--version`, and anything that is not a command."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="localvit",
        usage="localvit [--help] [--version] COMMAND ...",
        description=f"Locality for vision transformers.\n\ncommands:\n{listed}",
        epilog="'localvit COMMAND --help' describes a command.\n--debug prints the traceback of an error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"localvit {_version()}", help="show the version")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    name = parser.parse_args(arguments[:1]).command
    if name is None:
        parser.error("no command given; 'localvit --help' lists them")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS)
        hint = f"did you mean {' or '.join(close)}?" if close else "'localvit --help' lists the commands"
        parser.error(f"there is no command {name!r}; {hint}")
    return name


def _version() -> str:
    try:
        return version("localvit")
    except PackageNotFoundError:  # a copy of the source that was never installed
        from localvit.utils.version import VERSION

        return VERSION


def run(command: Callable[[], int | None], *, debug: bool) -> int:
    """Call `command`, print the error it may raise as one line, and return the exit status (see `main`)."""
    keep_freed_memory()
    with standard_streams():
        try:
            with log_to_stderr(), flushed_output():
                return command() or 0
        except KeyboardInterrupt:
            print("localvit: interrupted", file=sys.stderr)
            return 130
        except OutputClosed:
            return 0
        except Exception as error:
            if debug:
                raise
            message = str(error) or type(error).__name__
            print(printable_lines(f"localvit: error: {message}"), file=sys.stderr)
            return 2 if isinstance(error, UsageError) else 1
