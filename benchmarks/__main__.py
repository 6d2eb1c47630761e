"""Runs the benchmarks, each in a process of its own, and says what became of them.

    python -m benchmarks                      # every table of the README
    python -m benchmarks --list               # what there is
    python -m benchmarks compile_time staggered
    python -m benchmarks --quick              # seconds each, to see that everything works
    python -m benchmarks --gpu                # what needs a GPU

One that fails does not stop the others; the exit status is 1 if any did.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.catalogue import BENCHMARKS, Benchmark

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TRIAL_RESULTS = ROOT / "runs" / "trial" / "results"
BY_NAME = {benchmark.name: benchmark for benchmark in BENCHMARKS}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a benchmark."""

    name: str
    status: str
    seconds: float = 0.0
    files: str = ""
    failed: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Command line program; returns its exit status."""
    options = parse(argv)
    if options.list:
        print(table(("name", "where", "what"), [(b.name, b.place, b.about()) for b in BENCHMARKS]))
        return 0
    backend = default_backend()
    if options.gpu and backend != "gpu" and not options.quick:
        print(
            f"Not run: JAX sees no GPU here (its default backend is {backend}), so none of the "
            "figures for a GPU was measured.\nInstall the extra cuda12 or cuda13 on a machine with "
            "one; `--gpu --quick` tries the programs at a tiny size on any."
        )
        return 1
    outcomes = []
    for benchmark in chosen(options.names, gpu=options.gpu):
        arguments = benchmark.trial if options.quick else benchmark.arguments
        asked = benchmark.name in options.names
        try:
            outcomes.append(run(benchmark, arguments, backend, options, asked=asked))
        except KeyboardInterrupt:
            outcomes.append(Outcome(benchmark.name, "interrupted", failed=True))
            break
    rows = [(o.name, o.status, f"{o.seconds:.0f}", o.files) for o in outcomes]
    print("\n" + table(("benchmark", "status", "seconds", "written to"), rows))
    return int(any(outcome.failed for outcome in outcomes))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("names", nargs="*", metavar="name", help="which; default: all that apply")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no figures to quote")
    parser.add_argument("--gpu", action="store_true", help="what needs a GPU, and only that")
    parser.add_argument("--out", type=Path, help="directory of the tables")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - BY_NAME.keys():
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; --list shows them")
    return options


def chosen(names: Sequence[str], *, gpu: bool) -> list[Benchmark]:
    """Those named; else those of a GPU, or all that any machine can run."""
    if names:
        return [BY_NAME[name] for name in names]
    return [b for b in BENCHMARKS if (b.gpu if gpu else b.place != "gpu")]


def default_backend() -> str:
    """What JAX computes on here, found out in another process: asking takes hold of a GPU."""
    program = "import jax; print(jax.default_backend())"
    return subprocess.check_output([sys.executable, "-c", program], text=True).split()[-1]


def run(
    benchmark: Benchmark,
    arguments: Sequence[str],
    backend: str,
    options: argparse.Namespace,
    *,
    asked: bool,
) -> Outcome:
    """Runs one and checks that its tables are there, and new."""
    if benchmark.obstacle:
        return Outcome(benchmark.name, f"not run: {benchmark.obstacle}", failed=asked)
    out = (options.out or destination(benchmark, backend, quick=options.quick)).absolute()
    command = [sys.executable, "-m", benchmark.path, *arguments]
    print(f"\n$ {' '.join(['python', *command[1:]])}", flush=True)
    began, started = time.time(), time.perf_counter()
    status = subprocess.run(command, cwd=ROOT, env=environment(benchmark, out)).returncode
    seconds = time.perf_counter() - started
    missing = [file for file in benchmark.files if not _is_newer(out / file, began)]
    if status:
        return Outcome(benchmark.name, f"FAILED with status {status}", seconds, failed=True)
    if missing:
        problem = f"FAILED: did not write {', '.join(missing)}"
        return Outcome(benchmark.name, problem, seconds, failed=True)
    shown = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    files = ", ".join(f"{shown}/{name}.md" for name in benchmark.writes)
    return Outcome(benchmark.name, "ok", seconds, files)


def destination(benchmark: Benchmark, backend: str, *, quick: bool) -> Path:
    """The README's tables are a CPU's; those of another device lie beside them."""
    if quick:
        return TRIAL_RESULTS
    return RESULTS if backend == "cpu" or benchmark.place == "anywhere" else RESULTS / backend


def environment(benchmark: Benchmark, out: Path) -> Mapping[str, str]:
    """Where a process writes its tables, and which device it may see."""
    variables = {**os.environ, "GALORE_JAX_RESULTS": str(out)}
    if benchmark.place == "anywhere":
        variables["JAX_PLATFORMS"] = "cpu"
    return variables


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned Markdown."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    aligned = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        for line in (columns, ["-" * width for width in widths], *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def _is_newer(file: Path, moment: float) -> bool:
    # File systems keep time more coarsely than the clock does.
    return file.exists() and file.stat().st_mtime >= moment - 2


if __name__ == "__main__":
    sys.exit(main())
