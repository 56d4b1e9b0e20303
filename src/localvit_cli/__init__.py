"""The command line. It stands beside the package so that `localvit --help` need not import torch."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (the process's own by default) name, and return its exit status.

    0 is success, 1 a failure, 2 bad usage, 130 an interruption. Failures are one line on standard error; `--debug`
    shows where they came from.
    """
    import tyro

    from localvit_cli.demo import Demo
    from localvit_cli.eval import Eval
    from localvit_cli.info import Info
    from localvit_cli.models import Models
    from localvit_cli.predict import Predict
    from localvit_cli.train import Train

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[..., Any]] = {
        "train": Train,
        "eval": Eval,
        "predict": Predict,
        "models": Models,
        "info": Info,
        "demo": Demo,
    }
    debug = "--debug" in arguments
    command = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="localvit",
        description="Locality for vision transformers. Every command takes --debug, to show where an error came from.",
        args=[argument for argument in arguments if argument != "--debug"],
    )
    return run(command.run, debug=debug)


class UsageError(ValueError):
    """A flag's value that makes no sense; the exit status is 2."""


def run(command: Callable[[], int | None], *, debug: bool) -> int:
    """Call `command`; turn what it raises into a line for a person and an exit status."""
    try:
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
