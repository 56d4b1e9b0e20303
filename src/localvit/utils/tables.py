"""Tables and paragraphs as plain text that fits the terminal."""

import io
import shutil
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_GAP = 2  # spaces between columns


def format_table(
    rows: Sequence[Sequence[str]],
    *,
    headings: Sequence[str] = (),
    right: Collection[int] = (),
    width: int | None = None,
) -> str:
    """Lay `rows` out in columns, without borders or colors. No text is ever cut off.

    If the table is too wide, the cells of left-aligned columns wrap between words, and so do the headings. If it is
    still too wide, its last columns move to another table below, which repeats the first column.

    Args:
        rows: The cells of each row, as many as there are columns.
        headings: The titles of the columns.
        right: Indices of right-aligned columns, for numbers, whose cells do not wrap.
        width: Number of characters per line; by default that of the terminal, and 80 where standard output is not a
            terminal, unless the environment variable COLUMNS gives another.

    Raises:
        ValueError: If the rows differ in length.
    """
    width = shutil.get_terminal_size().columns if width is None else width
    cells = list(zip(*rows, strict=True)) if rows else [()] * len(headings)
    titles = headings or [""] * len(cells)
    columns = [
        _Column(heading, column, index in right)
        for index, (heading, column) in enumerate(zip(titles, cells, strict=True))
    ]
    blocks: list[list[_Column]] = [columns[:1]]
    for column in columns[1:]:
        needed = [*(each.narrowest for each in blocks[-1]), column.narrowest]
        if len(blocks[-1]) > 1 and _total(needed) > width:
            blocks.append(columns[:1])
        blocks[-1] = [*blocks[-1], column]
    return "\n\n".join(_render(block, width, bool(headings)) for block in blocks)


@dataclass(frozen=True)
class _Column:
    heading: str
    cells: tuple[str, ...]
    right: bool

    @property
    def widest(self) -> int:
        """Width at which no cell wraps."""
        lines = (line for cell in self.cells for line in cell.splitlines())
        return max(map(cell_len, (self.heading, *lines)))

    @property
    def narrowest(self) -> int:
        """Width below which a word or a number would be split."""
        unbroken = self.cells if self.right else " ".join(self.cells).split()
        return max(map(cell_len, (*self.heading.split(), *unbroken)), default=0)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _fitted(columns: Sequence[_Column], width: int) -> list[int]:
    """The width of each column: the widest give way first, and words are split only if there is no other way."""
    widths = [column.widest for column in columns]
    for least in ([column.narrowest for column in columns], [1] * len(columns)):
        while _total(widths) > width and (wide := [i for i in range(len(widths)) if widths[i] > least[i]]):
            widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def _render(columns: Sequence[_Column], width: int, show_header: bool) -> str:
    # Gaps are columns, because the widths of padded columns differ between versions of rich.
    table = Table(box=None, padding=0, pad_edge=False, show_header=show_header, header_style="")
    widths = _fitted(columns, width)
    for index, (column, own_width) in enumerate(zip(columns, widths, strict=True)):
        if index:
            table.add_column(width=_GAP)
        table.add_column(
            Text(column.heading), justify="right" if column.right else "left", width=own_width, overflow="fold"
        )
    for row in zip(*(column.cells for column in columns), strict=True):
        first, *others = map(Text, row)
        table.add_row(first, *(cell for other in others for cell in (None, other)))
    console = Console(file=io.StringIO(), width=_total(widths), color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def wrap_text(text: str, *, width: int | None = None) -> str:
    """Break `text` between words into lines of at most `width` characters, by default as `format_table` does."""
    width = shutil.get_terminal_size().columns if width is None else width
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
