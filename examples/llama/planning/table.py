"""The plan as a person wants to read it."""

from __future__ import annotations

import rich.table

from examples.llama.planning.compiled import Compiled
from examples.llama.planning.estimate import Estimate, fits
from examples.llama.planning.phases import GRADIENTS, INSIDE, LOGITS, SAVED, UPDATE

TERMS = (GRADIENTS, SAVED, INSIDE, LOGITS, UPDATE)


def table(estimate: Estimate, compiled: Compiled | None = None, *, title: str) -> rich.table.Table:
    """What there is, what of it lives at the peak, and where it fits.

    Args:
        estimate: of the step.
        compiled: what the compiler says of the same step, if it was asked.
        title: what is planned.
    """
    grid = rich.table.Table(title=title, title_justify="left", caption_justify="left")
    grid.add_column("GB (1e9 bytes)")
    grid.add_column("at most", justify="right")
    grid.add_column("at the peak", justify="right")
    kept = estimate.kept
    for name, size in {
        "weights": kept.weights,
        "projectors": kept.projectors,
        "moments": kept.moments,
        "state at full rank": kept.full_rank,
        "rest of the state": kept.refresh + kept.other,
    }.items():
        grid.add_row(name, gigabytes(size), gigabytes(size))
    grid.add_section()
    for name in TERMS:
        most = max(phase.terms.get(name, 0) for phase in estimate.phases)
        grid.add_row(name, gigabytes(most), gigabytes(estimate.fullest.terms.get(name, 0)))
    grid.add_section()
    grid.add_row("peak", "", gigabytes(estimate.peak), style="bold")
    grid.add_row("  in", "", estimate.fullest.name)
    if compiled is not None:
        grid.add_row(f"compiled for {compiled.target}", "", gigabytes(compiled.peak))
        grid.add_row("  arguments", "", gigabytes(compiled.arguments))
        grid.add_row("  temporaries", "", gigabytes(compiled.temporaries))
        grid.add_row("  estimate / compiled", "", f"{estimate.peak / compiled.peak:.3f}")
    peak = estimate.peak if compiled is None else max(compiled.peak, estimate.peak)
    grid.add_row("fits on", "", fits_text(peak), style="bold")
    return grid


def fits_text(peak: int) -> str:
    """The smallest card that is large enough, and the larger ones."""
    cards = [f"{card} GB" for card, enough in fits(peak).items() if enough]
    return ", ".join(cards) or "none of them"


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3f}"
