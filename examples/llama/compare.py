"""The same recipe under several optimizers: ``python -m examples.llama.compare --help``.

Every combination of variant, learning rate and seed is one ordinary training run in a process of
its own. A comparison that was interrupted is called again: finished runs are kept, an unfinished
one is resumed from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import rich.console
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from examples.llama import config, host, progress, report


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Compare optimizers over a grid of learning rates and seeds.

    Everything after a lone -- goes to each run of examples.llama.train as it stands. GaLore at a
    quarter of the width against AdamW, plain and with GaLore's split of rates:

    python -m examples.llama.compare --out runs/comparison
    --variants galore_adamw:rank=0.25 adamw adamw:matrix-lr-scale=0.25
    --learning-rates 3e-4 1e-3 3e-3 1e-2 --seeds 0 1 2 -- --steps 400
    """

    out: Path
    """Directory of the comparison; the runs live below it."""
    variants: tuple[str, ...] = ("galore_adamw:rank=0.25", "adamw", "adamw:matrix-lr-scale=0.25")
    """What to compare: OPTIMIZER or OPTIMIZER:OPTION=VALUE,... with options of the trainer."""
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    """Peak learning rates that each variant is tried with."""
    seeds: tuple[int, ...] = (0,)
    """Seeds that each variant is tried with at each rate."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run of a comparison."""

    variant: str
    learning_rate: float
    seed: int

    def directory(self, out: Path) -> Path:
        """Where it lives; readable, and one for each trial."""
        name = self.variant.replace(":", "-").replace(",", "-").replace("=", "_").replace("/", "_")
        return out / "runs" / f"{name}-lr_{self.learning_rate:g}-seed_{self.seed}"

    def arguments(self, out: Path, shared: Sequence[str]) -> list[str]:
        """The trainer's command line, but for --resume."""
        optimizer, _, options = self.variant.partition(":")
        pairs = [pair.partition("=") for pair in options.split(",") if pair]
        return [
            *shared,
            *("--optimizer", optimizer),
            *itertools.chain.from_iterable((f"--{name}", value) for name, _, value in pairs),
            *("--learning-rate", repr(self.learning_rate)),
            *("--seed", str(self.seed)),
            *("--run-dir", str(self.directory(out))),
        ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line program; returns its exit status."""
    own, shared = _split(sys.argv[1:] if argv is None else list(argv))
    options = tyro.cli(CompareConfig, args=own, prog="python -m examples.llama.compare")
    console = rich.console.Console()
    grid = itertools.product(options.variants, options.learning_rates, options.seeds)
    trials = [Trial(*point) for point in grid]
    try:
        # A mistake in the last one should not wait for the runs before it.
        finished = [is_finished(trial, options.out, shared) for trial in trials]
        for number, (trial, skip) in enumerate(zip(trials, finished, strict=True), 1):
            console.rule(f"{number}/{len(trials)}  {trial.directory(options.out).name}")
            if not skip and (status := run(trial, options.out, shared)) > 128:
                return status  # by a signal: somebody wants all of it to stop
    except ValueError as error:
        console.print(f"ERROR: {error}", style="bold red", markup=False, highlight=False)
        return 1
    done = [trial for trial in trials if (trial.directory(options.out) / "summary.json").exists()]
    if done:
        publish(collect(done, options.out), options.out, console)
    if len(done) < len(trials):
        console.print(f"{len(trials) - len(done)} of {len(trials)} runs failed", style="bold red")
        return 1
    return 0


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def is_finished(trial: Trial, out: Path, shared: Sequence[str]) -> bool:
    """Whether the trial has its summary already.

    Raises:
        ValueError: its options are wrong, or those of the finished run are others.
    """
    try:
        wanted = config.to_json(config.resolve(config.parse(trial.arguments(out, shared))))
    except ValueError as error:
        raise ValueError(f"{trial.variant}: {error}") from error
    summary = trial.directory(out) / "summary.json"
    if not summary.exists():
        return False
    found = json.loads(summary.read_text())["config"]
    for group in wanted.keys() - {"run"}:
        for name, value in json.loads(json.dumps(wanted[group])).items():
            if found[group].get(name) != value:
                raise ValueError(
                    f"{summary.parent} was run with {name} {found[group].get(name)!r}, not "
                    f"{value!r}: repeat the options of the first call, or choose another --out"
                )
    return True


def run(trial: Trial, out: Path, shared: Sequence[str]) -> int:
    """Trains in a process of its own, from a checkpoint if there is one; returns its status."""
    directory = trial.directory(out)
    resume = ["--resume"] if directory.exists() and any(directory.iterdir()) else []
    arguments = [*trial.arguments(out, shared), *resume]
    with host.StopSignal() as stop:
        # In a session of its own, so that it gets a signal once, from here, and can save.
        process = subprocess.Popen(
            [sys.executable, "-m", "examples.llama.train", *arguments], start_new_session=True
        )
        while process.poll() is None and stop.received is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.2)
        if stop.received is not None:
            process.send_signal(stop.received)
        return process.wait()


def collect(trials: Sequence[Trial], out: Path) -> list[dict[str, Any]]:
    """One row per variant and learning rate, seeds averaged, best rates first."""
    rows = []
    for (variant, rate), group in itertools.groupby(
        sorted(trials, key=lambda trial: (trial.variant, trial.learning_rate)),
        key=lambda trial: (trial.variant, trial.learning_rate),
    ):
        directories = [trial.directory(out) for trial in group]
        summaries = [json.loads((d / "summary.json").read_text()) for d in directories]
        losses = [summary["valid_loss"] for summary in summaries]
        rows.append(
            {
                "variant": variant,
                "learning_rate": rate,
                "runs": [str(directory.relative_to(out)) for directory in directories],
                "valid_loss": statistics.fmean(losses),
                "valid_loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
                "valid_perplexity": progress.perplexity(statistics.fmean(losses)),
                "state_bytes": summaries[0]["state_bytes"],
                "tokens_per_second": statistics.fmean(s["tokens_per_second"] for s in summaries),
                "unigram_nats": summaries[0]["unigram_nats"],
            }
        )
    return sorted(rows, key=lambda row: row["valid_loss"])


def best_of_each(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The row of the best learning rate of every variant, the best variant first."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        best.setdefault(row["variant"], row)
    return best


def publish(rows: list[dict[str, Any]], out: Path, console: rich.console.Console) -> None:
    """Writes results.json, table.md and comparison.png, and shows the table."""
    host.write_json(out / "results.json", rows)
    table = markdown_table(rows)
    (out / "table.md").write_text(table)
    plot(rows, out)
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print(f"written to {out}: results.json, table.md, comparison.png", highlight=False)


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown; the best learning rate of each variant is bold."""
    best = best_of_each(rows)
    lines = [
        "| optimizer | learning rate | validation loss | perplexity "
        "| state of block matrices | state in all | tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        spread = row["valid_loss_std"]
        loss = f"{row['valid_loss']:.4f}" + ("" if spread is None else f" ± {spread:.4f}")
        if row is best[row["variant"]]:
            loss = f"**{loss}**"
        size = row["state_bytes"]
        lines.append(
            f"| {row['variant']} | {row['learning_rate']:g} | {loss} "
            f"| {row['valid_perplexity']:.2f} | {report.bytes_text(size['block_matrices'])} "
            f"| {report.bytes_text(size['total'])} | {row['tokens_per_second']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Left: validation loss over tokens at the best rate of each; right: against the rate."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    curves, rates = figure.subplots(1, 2)
    colors = matplotlib.color_sequences["tab10"]
    for color, (variant, best) in zip(
        itertools.cycle(colors), best_of_each(rows).items(), strict=False
    ):
        tokens, losses = _validation_curves([out / run for run in best["runs"]])
        label = f"{variant}, lr {best['learning_rate']:g}"
        curves.plot(tokens, losses.mean(0), color=color, label=label)
        curves.fill_between(tokens, losses.min(0), losses.max(0), color=color, alpha=0.2)

        points = sorted(
            (r["learning_rate"], r["valid_loss"]) for r in rows if r["variant"] == variant
        )
        rates.plot(*zip(*points, strict=True), "o-", color=color)
    baseline = rows[0]["unigram_nats"]
    curves.axhline(baseline, color="gray", linestyle="--", label=f"unigrams, {baseline:.2f}")
    curves.set(title="at the best learning rate", xlabel="training tokens")
    curves.xaxis.set_major_formatter(EngFormatter(sep=""))
    rates.set(title="at the end", xlabel="peak learning rate", xscale="log")
    tried = sorted({row["learning_rate"] for row in rows})
    rates.set_xticks(tried, [f"{rate:g}" for rate in tried])
    rates.minorticks_off()
    for axes in (curves, rates):
        axes.set_ylabel("validation loss [nats per token]")
        axes.grid(alpha=0.3)
    # One legend for both, below them: names of variants are long, and colours mean the same.
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(out / "comparison.png", dpi=150)


def _validation_curves(runs: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [evaluations] and losses [runs, evaluations]; all runs are evaluated alike."""
    curves = [
        [(row["tokens"], row["valid_loss"]) for row in rows if "valid_loss" in row]
        for rows in (progress.read_metrics(run / "metrics.jsonl") for run in runs)
    ]
    points = np.asarray(curves, float)
    return points[0, :, 0], points[:, :, 1]


if __name__ == "__main__":
    sys.exit(main())
