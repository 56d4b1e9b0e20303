"""Which blocks: the numbers that a user gives, checked against those that there are."""

import re
from collections.abc import Iterable

BlockSelection = str | Iterable[int] | None


def select_blocks(blocks: BlockSelection, depth: int, *, argument: str = "local_blocks") -> frozenset[int]:
    """Indices from 0 of the blocks that get locality, out of `depth`.

    `blocks` counts from 1 as the paper's Table 5 does: None for all, "1-4", "1-4,9,12", "" or [] for none, or any list
    of numbers. Raises ValueError, naming the `argument`, for what is no such list or no such block.
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
