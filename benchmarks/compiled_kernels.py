"""Kernels of `localvit.ops.triton` compiled for a GPU that is not there, and what they take of it."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.compiler import ASTSource

TYPES: dict[Any, str] = {
    **{torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"},
    **{int: "i32", float: "fp32"},
}


def source_of(kernel: Any, arguments: Sequence[Any], constants: Sequence[Any]) -> ASTSource:
    """What Triton compiles for these arguments: it specializes on None, on ones and on multiples of 16."""
    names = kernel.arg_names
    assert len(names) == len(arguments) + len(constants)
    values, aligned = dict(zip(names[len(arguments) :], constants, strict=True)), []
    signature: dict[str, str] = {}
    for name, value in zip(names, arguments, strict=False):
        if value is None or (type(value) is int and value == 1):
            values[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            aligned.append(name)
        else:
            signature[name] = TYPES[type(value)]
            aligned += [name] * (isinstance(value, int) and value % 16 == 0)
    signature |= dict.fromkeys(values, "constexpr")
    return ASTSource(
        kernel,
        {name: signature[name] for name in names},
        {(names.index(name),): value for name, value in values.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, and bytes of stack and local memory, of each thread; the file is written into a folder."""
    found = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _read_by(knobs.nvidia.cuobjdump, "-res-usage", cubin, folder))
    return {name: int(value) for name, value in found}


def instructions(cubin: bytes, folder: Path) -> list[str]:
    """The lines of the machine code, labels between them; the file is written into a folder."""
    return _read_by(knobs.nvidia.nvdisasm, "-c", cubin, folder).splitlines()


def _read_by(tool: Any, option: str, cubin: bytes, folder: Path) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run([tool.path, option, path], capture_output=True, text=True, check=True).stdout
