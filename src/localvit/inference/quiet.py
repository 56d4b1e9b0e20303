"""Exporters and runtimes without their messages. What fails is raised."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of exporters and runtimes about themselves."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch.utils")
    ]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what exporters and quantizers log, with the root logger too, and print."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def without_messages() -> Iterator[None]:
    """Without what a package warns of, logs and prints, and without the handler that it gives the root logger."""
    handlers, level = list(logging.root.handlers), logging.root.level
    try:
        with silent(), quiet(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
