"""Tables as text, with aligned columns."""

from __future__ import annotations

from collections.abc import Container, Sequence


def text_table(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
    """Rows of cells below each other, two spaces between columns.

    Args:
        rows: all of one length, the headings first.
        right: the columns whose cells end at the right; those of the others begin at the left.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
