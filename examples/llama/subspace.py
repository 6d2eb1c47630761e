"""How the subspaces of a run move: what is written down of them, and the picture of it.

A reading has, for every kind of matrix, one number per layer::

    {"blocks/attn/q/kernel": {"refreshes": [3, 3], "gap": [50, 50], "overlap": [0.7, 0.6]}, ...}

An overlap needs two refreshes, and is None before; "captured" is there only where the gradients of
a step were formed in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

import galore_jax as gj
from examples.llama.progress import Row

Reading = dict[str, dict[str, list[Any]]]

KINDS = ("q", "k", "v", "o", "gate", "up", "down")  # in the order of the model


def reading(
    metrics: Mapping[str, gj.SubspaceMetrics], captured: Mapping[str, jax.Array]
) -> Reading:
    """Numbers that are on the host, as they are written to a log.

    Args:
        metrics: what `gj.metrics` returned.
        captured: what `gj.captured_energy` returned, or nothing.
    """
    found = {}
    for path, seen in metrics.items():
        refreshes, overlaps = (np.ravel(x).tolist() for x in (seen.refreshes, seen.overlap))
        found[path] = {
            "refreshes": refreshes,
            "gap": np.ravel(seen.gap).tolist(),
            "overlap": [
                overlap if count > 1 else None
                for count, overlap in zip(refreshes, overlaps, strict=True)
            ],
        }
        if path in captured:
            found[path]["captured"] = np.ravel(captured[path]).tolist()
    return found


def history(rows: Sequence[Row]) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
    """The readings in the rows of a log.

    Returns:
        Their steps ``[T]``, and per quantity and kind of matrix ``[layers, T]``; NaN where there is
        no number.
    """
    read = [row for row in rows if row.get("subspace")]
    steps = np.array([row["step"] for row in read])
    paths = sorted(read[-1]["subspace"], key=_place) if read else []

    def of(quantity: str) -> dict[str, np.ndarray]:
        columns = {
            path: [row["subspace"].get(path, {}).get(quantity) for row in read] for path in paths
        }
        return {_kind(path): _table(own) for path, own in columns.items() if any(own)}

    return steps, {name: of(name) for name in ("overlap", "captured", "gap")}


def _table(columns: Sequence[list[Any] | None]) -> np.ndarray:
    """``[layers, T]`` from one list per reading, some of which are missing."""
    layers = max(len(column) for column in columns if column)
    filled = [column or [None] * layers for column in columns]
    return np.array(filled, dtype=float).T


def _kind(path: str) -> str:
    """What a person calls it: ``q`` of ``blocks/attn/q/kernel``."""
    return path.removesuffix("/kernel").split("/")[-1]


def _place(path: str) -> tuple[int, str]:
    kind = _kind(path)
    return (KINDS.index(kind) if kind in KINDS else len(KINDS)), path


# What a picture has a row of panels for, and what is written next to its colours.
LABELS = {
    "overlap": "overlap with the\nsubspace before",
    "captured": "share of the\ngradient captured",
    "gap": "steps between\nrefreshes",
}


def plot(path: Path, rows: Sequence[Row], *, title: str) -> bool:
    """Draws layers against steps, a panel per kind of matrix; False if there is nothing to draw.

    A gap that is the same everywhere and always is said in the title.
    """
    steps, seen = history(rows)
    gaps = {int(gap) for table in seen["gap"].values() for gap in np.unique(table[table > 0])}
    drawn = [
        name
        for name in LABELS
        if any(np.isfinite(table).any() for table in seen[name].values())
        and (name != "gap" or len(gaps) > 1)
    ]
    if not drawn:
        return False
    if len(gaps) == 1:
        title += f", refreshed every {gaps.pop()} steps"
    kinds = list(seen[drawn[0]])
    figure = Figure(figsize=(1.5 + 1.75 * len(kinds), 0.9 + 1.9 * len(drawn)), layout="constrained")
    grid = figure.subplots(len(drawn), len(kinds), sharex=True, sharey=True, squeeze=False)
    for name, panels in zip(drawn, grid, strict=True):
        norm = LogNorm(min(gaps), max(gaps)) if name == "gap" else Normalize(0, 1)
        for kind, axes in zip(kinds, panels, strict=True):
            image = _heat_map(axes, steps, seen[name][kind], norm, name)
        bar = figure.colorbar(image, ax=list(panels), pad=0.01, aspect=12)
        bar.set_label(LABELS[name])
        if name == "gap":
            bar.ax.yaxis.set_major_locator(FixedLocator(sorted(gaps)))
            bar.ax.yaxis.set_minor_locator(NullLocator())
            bar.ax.yaxis.set_major_formatter(ScalarFormatter())
    for kind, axes in zip(kinds, grid[0], strict=True):
        axes.set_title(kind)
    figure.suptitle(title)
    figure.supxlabel("optimizer step")
    figure.supylabel("layer")
    figure.savefig(path, dpi=150)
    return True


def _heat_map(axes: Any, steps: np.ndarray, table: np.ndarray, norm: Normalize, name: str) -> Any:
    """One panel; a reading stands for the steps since the one before."""
    left = max(0, 2 * steps[0] - steps[1]) if len(steps) > 1 else 0
    edges = np.concatenate([[left], steps])
    layers = np.arange(len(table) + 1) - 0.5
    axes.set_facecolor("0.9")  # where there is no number
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    colours = "cividis" if name == "gap" else "viridis"
    return axes.pcolormesh(edges, layers, np.ma.masked_invalid(table), norm=norm, cmap=colours)
