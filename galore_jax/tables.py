"""Text for people: rows whose columns line up, and numbers of bytes."""

from __future__ import annotations

from collections.abc import Sequence


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A header, a rule, and a line for each row."""
    lines = aligned([header, *rows])
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def shape_text(shape: tuple[int, ...]) -> str:
    return "(" + ",".join(map(str, shape)) + ")"


def bytes_text(size: int) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def paths_text(paths: Sequence[str], most: int = 3) -> str:
    """The first few, and how many more."""
    rest = len(paths) - most
    return ", ".join(paths[:most]) + (f" and {rest} more" if rest > 0 else "")
