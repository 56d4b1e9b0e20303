"""Processes that have imported torch and localvit from their start.

Each is forked from a server that imports them once. A new Python takes several seconds for that, most of a short test.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *(f"localvit_cli.{name}" for name in ("console", "eval", "predict", "published", "train")),
        "localvit.train.curves",
    ]
)


def start(
    program: Callable[..., object],
    *arguments: object,
    out: Path | str = os.devnull,
    err: Path | str = os.devnull,
    environment: Mapping[str, str] | None = None,
    own_session: bool = False,
) -> BaseProcess:
    """Call `program(*arguments)`, a function of a module, in a new process.

    Args:
        program: What to call.
        arguments: What to call it with.
        out: File, pipe or terminal of its standard output.
        err: The same for its standard error.
        environment: All environment variables; by default those of this process.
        own_session: Whether it leads a session, so that a signal can be sent to it with its workers.
    """
    variables = dict(os.environ if environment is None else environment)
    process = _CONTEXT.Process(target=_call, args=(program, arguments, (str(out), str(err)), variables, own_session))
    process.start()
    return process


def _call(
    program: Callable[..., object],
    arguments: tuple[object, ...],
    outputs: tuple[str, str],
    variables: dict[str, str],
    own_session: bool,
) -> None:
    if own_session:
        os.setsid()
    for number, path in enumerate(outputs, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(variables)
    # As in a new Python. Otherwise its own processes, such as those of a DataLoader, would get another server.
    multiprocessing.set_start_method(None, force=True)
    import torch

    torch.set_num_threads(1)
    program(*arguments)


def status_of(process: BaseProcess, timeout: float = 120) -> int:
    """Wait for a process; returns its exit status, negative for a signal."""
    process.join(timeout)
    assert process.exitcode is not None, f"{process} runs for more than {timeout} s"
    return process.exitcode


def run_localvit(*arguments: object) -> None:
    """The command line, as `python -m localvit` starts it."""
    import localvit_cli

    sys.exit(localvit_cli.main([*map(str, arguments)]))


def run_source(source: str, *arguments: object) -> None:
    """Python source, as `python -c` runs it."""
    sys.argv = ["-c", *map(str, arguments)]
    sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(source, "-c", "exec"), vars(sys.modules["__main__"]))


def start_group(
    processes: int, program: Callable[..., object], *arguments: object, out: Path, err: Path
) -> list[BaseProcess]:
    """Start `processes` with the environment variables that torchrun gives them; all append to the same files."""
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    return [
        start(
            program,
            *arguments,
            out=out,
            err=err,
            environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)},
        )
        for rank in range(processes)
    ]


def pool(processes: int, *, begin: Callable[[], object] | None = None) -> ProcessPoolExecutor:
    """Processes that return what they compute; each calls `begin` first. They are those of `start`."""
    return ProcessPoolExecutor(processes, _CONTEXT, begin)


def free_port() -> int:
    """A TCP port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
