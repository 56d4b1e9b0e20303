"""Whether the operators of `localvit.ops.kernels` are used."""

_used = False


def use(on: bool) -> None:
    """Switch the Triton kernels on or off, for all models of the process. They are off until somebody does.

    No GPU has measured them yet: run `benchmarks/kernels_speed.py` and the tests of `tests/kernels` on yours first.

    Raises:
        ModuleNotFoundError: when they are switched on and Triton is not installed.
    """
    global _used
    if on:
        try:
            import triton  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("the kernels need Triton, which is not installed: pip install triton") from error
    _used = on


def in_use() -> bool:
    """Whether the Triton kernels are switched on."""
    return _used
