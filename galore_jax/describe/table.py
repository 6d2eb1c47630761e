"""Rows of text with columns that line up."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jax.sharding import PartitionSpec

from galore_jax.describe.arrays import names_text
from galore_jax.views.specs import axis_names


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A header, a rule, and a line for each row."""
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def shape_text(shape: tuple[int, ...]) -> str:
    return "(" + ",".join(map(str, shape)) + ")"


def spec_text(spec: PartitionSpec | None) -> str:
    """One entry per axis, "-" for an axis that is whole; nothing without a spec."""
    if spec is None:
        return ""
    entries = (names_text(axis_names(entry)) for entry in spec)
    return "(" + ",".join(entry or "-" for entry in entries) + ")"


def bytes_text(size: int) -> str:
    if size < 1024:
        return f"{size} B"
    power = min(int(math.log2(size)) // 10, 3)
    return f"{size / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def paths_text(paths: Sequence[str], most: int = 3) -> str:
    """The first few, and how many more."""
    rest = len(paths) - most
    return ", ".join(paths[:most]) + (f" and {rest} more" if rest > 0 else "")
