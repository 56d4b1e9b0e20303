"""The command line. It stands beside the package so that `localvit --help` need not import torch."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from localvit_cli.allocator import keep_freed_memory
from localvit_cli.console import log_to_stderr


COMMANDS = {
    "train": "Train a model by a recipe, a file of settings and flags.",
    "eval": "Evaluate a model: each image exactly once, on one process or many.",
    "check-data": "Find what would hurt in a folder of images before training on it.",
    "compare": "Put training runs side by side.",
    "predict": "Tell the best classes of images.",
    "models": "List the models, with their size, cost and published accuracy.",
    "info": "Show what a model is, or what a checkpoint file holds.",
    "bench": "Measure models beside a baseline: speed, latency, memory, cost.",
    "demo": "Train, evaluate and use a small model on handwritten digits.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (the process's own by default) name, and return its exit status.

    0 is success, 1 a failure, 2 bad usage, 130 an interruption. Failures are one line on standard error; `--debug`
    shows where they came from.
    """
    import tyro

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    commands = {name: _command(name, summary, name in arguments[:1]) for name, summary in COMMANDS.items()}

    def parse_and_run() -> int | None:
        command = tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="localvit",
            description="Locality for vision transformers. Each command takes --debug, to show where errors come from.",
            args=arguments,
        )
        return command.run()

    return run(parse_and_run, debug=debug)


def _command(name: str, summary: str, wanted: bool) -> Callable[..., Any]:
    """The command's class if it is `wanted`; of the others, whose imports take time, only what the help says."""
    if wanted:
        module = importlib.import_module(f"localvit_cli.{name.replace('-', '_')}")
        return getattr(module, name.title().replace("-", ""))

    def described() -> None: ...

    described.__doc__ = summary
    return described


class UsageError(ValueError):
    """A flag's value that makes no sense; the exit status is 2."""


def run(command: Callable[[], int | None], *, debug: bool) -> int:
    """Call `command`; turn what it raises into a line for a person and an exit status."""
    keep_freed_memory()
    try:
        with log_to_stderr():
            return command() or 0
    except KeyboardInterrupt:
        print("localvit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        message = str(error) or type(error).__name__
        print(f"localvit: error: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
