"""Which blocks get locality: a user's selection, checked against the blocks of the model."""

import re
from collections.abc import Iterable

BlockSelection = str | Iterable[int] | None
"""None for all blocks, "1-4", "1-4,9,12", "" or [] for none, or any iterable of numbers; blocks count from 1."""


def select_blocks(blocks: BlockSelection, depth: int, *, argument: str = "local_blocks") -> frozenset[int]:
    """Indices, from 0, of the selected blocks of a model of `depth` blocks.

    Args:
        blocks: the selection, which counts from 1 as the paper's Table 5 does.
        depth: number of blocks of the model.
        argument: name of the user's argument, for error messages.

    Raises:
        ValueError: for text that is not a list of numbers and ranges, or a number without a block.
    """
    if blocks is None:
        return frozenset(range(depth))
    if isinstance(blocks, str):
        numbers: set[int] = set()
        for part in filter(None, re.split(r"[,\s]+", blocks.strip())):
            match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
            if not match:
                raise ValueError(f"{argument}={blocks!r}: {part!r} is neither a block like 3 nor a range like 1-4")
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise ValueError(f"{argument}={blocks!r}: the range {part} runs backwards")
            numbers.update(range(first, last + 1))
    else:
        numbers = set(blocks)
    outside = sorted(number for number in numbers if not 1 <= number <= depth)
    if outside:
        raise ValueError(f"{argument}={blocks!r}: the model has blocks 1 to {depth}, not {outside}")
    return frozenset(number - 1 for number in numbers)
