"""What optimizers learn on the example's default corpus: hours on a few cores.

    python -m benchmarks.learning [--only transports few_bits] [-- --steps 400]

Each line is the mean over its seeds. Runs live in `--out`; what is finished there is not trained
again, what was interrupted goes on. Options after a lone -- go to every run of the trainer.
"""

import argparse
import json
import re
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report
from examples.llama import compare


class Grid(NamedTuple):
    """Variants, each at every rate with every seed."""

    variants: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]


# Clipping is to see whole gradients, as it does under AdamW.
_FULL_GRADIENT = ",backward=full"
FULL = f"galore_adamw:rank=0.25{_FULL_GRADIENT}"
SPLIT = "adamw:matrix-lr-scale=0.25"
TRANSPORTS = (
    Grid((FULL, f"{FULL},transport=rotate"), (1e-2,), (0, 1, 2)),
    Grid((f"{FULL},projector=gram_eigh,transport=keep",), (1e-2,), (0, 1)),
    Grid((f"{FULL},transport=reset", f"{FULL},side=long"), (1e-2,), (0,)),
    Grid((FULL,), (1e-3, 3e-3), (0,)),
    Grid((SPLIT,), (3e-3,), (0, 1, 2)),
    Grid((SPLIT,), (1e-3, 1e-2), (0,)),
    Grid(("adamw",), (1e-3,), (0, 1)),
    Grid(("adamw",), (3e-4, 3e-3, 1e-2), (0,)),
)
INT8 = f"q_galore_adamw8bit:rank=0.25{_FULL_GRADIENT},weights=int8"
FEW_BITS = (
    Grid((INT8, f"{INT8},rounding=nearest"), (1e-2,), (0, 1, 2)),
    Grid((INT8, f"{INT8},rounding=nearest"), (1e-3,), (0,)),
)
LONGER = (
    Grid(("adamw", "adamw8bit"), (1e-3,), (0,)),
    Grid((f"{FULL},gap=10", f"{FULL},refresh=adaptive,gap=10"), (1e-2,), (0,)),
)
STEPS = 500


def main() -> None:
    """Command line program."""
    own, shared = _split(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--only", nargs="+", default=list(TABLES), choices=TABLES)
    parser.add_argument("--first", action="store_true", help="one run of each table: a trial")
    options = parser.parse_args(own)
    for table in options.only:
        TABLES[table](options.out / table, shared, options.first)


def transports(out: Path, shared: Sequence[str], first: bool) -> None:
    """GaLore and AdamW at several rates, and a picture of the best of each."""
    trials = trained(TRANSPORTS, out, ["--steps", str(STEPS), *shared], first)
    rows = [row | {"variant": short(row["variant"])} for row in compare.collect(trials, out)]
    compare.plot(rows, out)
    write("learning", compare.markdown_table(rows), rows)
    shutil.copyfile(out / "comparison.png", report.results_directory() / "learning.png")


def few_bits(out: Path, shared: Sequence[str], first: bool) -> None:
    """Weights, bases and moments in few bits."""
    short, long = ["--steps", str(STEPS), *shared], ["--steps", str(2 * STEPS), *shared]
    rows = _rows(trained(FEW_BITS, out / "short", short, first), out / "short")
    rows += _rows(trained(LONGER, out / "long", long, first), out / "long")
    write("learning_in_few_bits", few_bits_table(rows), rows)


TABLES = {"transports": transports, "few_bits": few_bits}


def short(variant: str) -> str:
    """Its name without what is the same for all."""
    return variant.replace(_FULL_GRADIENT, "")


def trained(
    grids: Sequence[Grid], out: Path, shared: Sequence[str], first: bool
) -> list[compare.Trial]:
    """All runs of the grids, finished; of a trial only the first.

    Raises:
      SystemExit: One failed, or was stopped.
    """
    trials = []
    for grid in grids[:1] if first else grids:
        chosen = Grid(*(axis[:1] for axis in grid)) if first else grid
        variants, rates, seeds = chosen
        line = ["--out", str(out), "--variants", *variants]
        line += ["--learning-rates", *map(repr, rates), "--seeds", *map(str, seeds)]
        if status := compare.main([*line, "--", *shared]):
            raise SystemExit(status)
        trials += [compare.Trial(v, r, s) for v in variants for r in rates for s in seeds]
    return trials


def _rows(trials: Sequence[compare.Trial], out: Path) -> list[dict[str, Any]]:
    """Lines of `few_bits_table`."""
    rows = []
    for row in compare.collect(trials, out):
        found = [json.loads((out / run / "summary.json").read_text()) for run in row["runs"]]
        rows.append(
            {
                "variant": f"{short(row['variant'])}-lr_{row['learning_rate']:g}",
                "steps": found[0]["steps"],
                "seeds": [summary["seed"] for summary in found],
                "validation loss": [summary["valid_loss"] for summary in found],
                "refreshes": [(summary["refreshes"] or {}).get("done") for summary in found],
            }
        )
    return rows


def few_bits_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| variant, learning rate | steps | seeds | validation loss | refreshes of 28 bases |",
        "|---|---:|---|---:|---:|",
    ]
    for row in rows:
        losses = row["validation loss"]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        cells = (
            re.sub("[:,]", "-", row["variant"]).replace("=", "_"),
            row["steps"],
            ", ".join(map(str, row["seeds"])),
            f"{statistics.fmean(losses):.4f}{spread}",
            ", ".join(str(done) for done in row["refreshes"] if done is not None),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def write(name: str, table: str, rows: Any) -> None:
    """Both forms of a table, below the command and what it depends on."""
    payload = {"command": report.command(), "environment": report.environment(), "rows": rows}
    head = ", ".join(f"{key} {value}" for key, value in payload["environment"].items())
    results = report.results_directory()
    (results / f"{name}.md").write_text(f"`{payload['command']}`: {head}\n\n{table}")
    (results / f"{name}.json").write_text(json.dumps(payload, indent=1) + "\n")


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


if __name__ == "__main__":
    main()
