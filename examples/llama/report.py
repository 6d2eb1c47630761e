"""What a run leaves behind when it ends: a picture, a table, a summary to compute with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import rich.table
from matplotlib.figure import Figure

import galore_jax as gj
from examples.llama import subspace
from examples.llama.config import TrainConfig
from examples.llama.optimizers import is_block_matrix, path_name
from examples.llama.progress import Row, clock, perplexity, read_metrics


def state_bytes(tx: optax.GradientTransformation, params: Any) -> dict[str, int]:
    """Bytes of the optimizer state, in all and for the block matrices; nothing is allocated."""
    state = jax.eval_shape(tx.init, params)
    sizes = {
        path_name(path): math.prod(x.shape) * x.dtype.itemsize
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }
    matrices = sum(size for name, size in sizes.items() if is_block_matrix(name))
    return {"total": sum(sizes.values()), "block_matrices": matrices}


def refreshes(opt_state: Any) -> dict[str, int] | None:
    """How often bases were recomputed, and how many there are; None without any."""
    counts = [np.asarray(seen.refreshes) for seen in gj.metrics(opt_state).values()]
    if not counts:
        return None
    return {
        "done": int(sum(count.sum() for count in counts)),
        "bases": sum(count.size for count in counts),
    }


def summary_table(summary: dict[str, Any]) -> rich.table.Table:
    """The closing table of a run."""
    table = rich.table.Table(show_header=False)
    loss, gain = summary["valid_loss"], summary["unigram_nats"] - summary["valid_loss"]
    own, adamw = summary["state_bytes"], summary["adamw_state_bytes"]
    rows = {
        "optimizer": summary["optimizer"],
        "validation loss": f"{loss:.4f} nats "
        f"({abs(gain):.2f} {'better' if gain > 0 else 'worse'} than unigrams)",
        "validation perplexity": f"{perplexity(loss):.2f}",
        "optimizer state": _against(own["total"], adamw["total"]),
        "  of block matrices": _against(own["block_matrices"], adamw["block_matrices"]),
        "speed": f"{summary['tokens_per_second']:,.0f} tokens/s",
        "time": clock(summary["seconds"]),
        "steps": f"{summary['steps']:,} ({summary['tokens']:,} tokens)",
    }
    if summary["refreshes"]:
        done, bases = summary["refreshes"]["done"], summary["refreshes"]["bases"]
        rows["refreshes"] = f"{done:,} of {bases} bases ({done / bases:.1f} each)"
    if summary["skipped_steps"]:
        rows["skipped"] = f"{summary['skipped_steps']} non-finite steps"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _against(size: int, reference: int) -> str:
    return f"{bytes_text(size)} ({size / reference:.0%} of AdamW's {bytes_text(reference)})"


def bytes_text(size: int) -> str:
    """A size in the largest decimal unit that it has one of."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} B"


def draw(settings: TrainConfig, unigram_nats: float) -> None:
    """The pictures of a run, from its log."""
    run_dir = settings.run.run_dir
    rows = read_metrics(run_dir / "metrics.jsonl")
    name = f"{settings.model.preset}, {settings.optimizer.optimizer}"
    plot_losses(
        run_dir / "loss.png",
        rows,
        unigram_nats=unigram_nats,
        title=f"{name}, learning rate {settings.schedule.learning_rate:g}",
    )
    subspace.plot(run_dir / "subspace.png", rows, title=f"{name}, rank {settings.optimizer.rank}")


def plot_losses(path: Path, rows: list[Row], *, unigram_nats: float, title: str) -> None:
    """Training and validation loss over the steps, against what a unigram model would reach."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    valid = [(row["step"], row["valid_loss"]) for row in rows if row.get("valid_loss") is not None]
    if train:
        steps, losses = np.transpose(train)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        smooth = moving_average(losses, max(1, len(losses) // 50))
        axes.plot(steps, smooth, color="tab:blue", label="training (moving average)")
    if valid:
        steps, losses = np.transpose(valid)
        axes.plot(steps, losses, "o-", color="tab:orange", markersize=4, label="validation")
        axes.annotate(
            f"{losses[-1]:.3f}",
            (steps[-1], losses[-1]),
            xytext=(0, 16),  # above the curve: below it is the frame
            textcoords="offset points",
            ha="right",
            color="tab:orange",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    axes.axhline(unigram_nats, color="gray", linestyle="--", label=f"unigrams, {unigram_nats:.2f}")
    axes.set(title=title, xlabel="optimizer step", ylabel="loss [nats per token]")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and up to `window - 1` before it."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
