"""Runs of the trainer that last a second: the corpus, the command line, what they leave behind."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults.runs import SIZES, VOCAB, write_corpus
from benchmarks.faults.runs import saved_arrays as arrays
from examples.llama import train

__all__ = [
    "GALORE",
    "SHORT",
    "SIZES",
    "VOCAB",
    "arguments",
    "arrays",
    "command",
    "rows",
    "run",
    "saved_identity",
    "write_corpus",
]

SHORT = {"steps": 8, "eval-every": 4, "eval-batches": 2, "save-every": 4, "log-every": 2}
OPTIMIZER = {"learning-rate": 3e-3, "seed": 0}
GALORE = {"optimizer": "galore_adamw", "rank": 4, "gap": 3, "refresh": "staggered"}


def arguments(corpus: Path, run_dir: Path, *flags: str, **options: object) -> list[str]:
    """The command line of a tiny run; options by their Python names."""
    paths = [str(corpus / "train.npy"), str(corpus / "valid.npy")]
    named = SIZES | SHORT | OPTIMIZER | {k.replace("_", "-"): v for k, v in options.items()}
    line = ["--run-dir", str(run_dir), "--source", "tokens", "--paths", *paths]
    for name, value in named.items():
        line += [f"--{name}", str(value)]
    return [*line, *flags]


def run(corpus: Path, run_dir: Path, *flags: str, **options: object) -> int:
    """Trains in this process; the exit status."""
    return train.main(arguments(corpus, run_dir, *flags, **options))


def rows(run_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl, but for what the clock put in."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def command(line: Sequence[str]) -> list[str]:
    """The program of a run in a process of its own."""
    return [sys.executable, "-m", "examples.llama.train", *line]


def saved_identity(run_dir: Path, step: int) -> dict[str, Any]:
    """What a checkpoint insists on."""
    path = run_dir / "checkpoints" / f"{step:08d}" / "run.json"
    return json.loads(path.read_text())["identity"]
