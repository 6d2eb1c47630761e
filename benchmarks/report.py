"""Honest timing and tables: interleaved runs, minimum and median, hardware and load in the head."""

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

PEERS = ("torch", "galore-torch", "pytorch-optimizer", "bitsandbytes", "torchao")
RESULTS = Path(__file__).parent / "results"
# Where `python -m benchmarks --out` sends the tables of its processes.
RESULTS_VARIABLE = "GALORE_JAX_RESULTS"
# Before the benchmark adds its own.
_LOAD_BEFORE = os.getloadavg()[0]


class Timing(NamedTuple):
    """Seconds of one function over several runs."""

    best: float
    median: float


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Runs all functions in turn, `repeats` times, after one warm-up each.

    Machines drift; in turn, they drift for all alike.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(min(times), float(np.median(times))) for name, times in seconds.items()}


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {}
    for package in ("jax", "jaxlib", "optax", *PEERS):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": _cores(),
        "load": _LOAD_BEFORE,
        "load at the end": os.getloadavg()[0],
        "python": platform.python_version(),
        **versions,
    }


def command() -> str:
    """The command line of this process, as one would type it."""
    spec = sys.modules["__main__"].__spec__
    program = ["python", "-m", spec.name] if spec else ["python", sys.argv[0]]
    return " ".join([*program, *sys.argv[1:]])


def publish(
    title: str,
    rows: Sequence[dict[str, Any]],
    name: str,
    left_out: Mapping[str, str] | None = None,
) -> None:
    """Prints a Markdown table with its environment; writes both, and a JSON, to the results.

    Args:
      title: What is measured, and in which unit.
      rows: One dictionary per row; the keys of the first are the columns, ratios before times.
      name: Of the files.
      left_out: Peers that are not in the table, and why.
    """
    payload = {
        "title": title,
        "command": command(),
        "environment": environment(),
        "left out": dict(left_out or {}),
        "rows": list(rows),
    }
    text = markdown(payload)
    print(text, flush=True)
    results = results_directory()
    (results / f"{name}.md").write_text(text)
    (results / f"{name}.json").write_text(json.dumps(payload, indent=1) + "\n")


def results_directory() -> Path:
    """Where tables are written to."""
    results = Path(os.environ.get(RESULTS_VARIABLE) or RESULTS)
    results.mkdir(parents=True, exist_ok=True)
    return results


def markdown(payload: dict[str, Any]) -> str:
    """The table of a result, below its title and what it depends on."""
    columns = list(payload["rows"][0])
    missing = [f"Left out: {peer}, {why}." for peer, why in payload["left out"].items()]
    head = payload["environment"].items()
    lines = [
        f"### {payload['title']}",
        "",
        f"`{payload['command']}`: " + ", ".join(f"{key} {_format(value)}" for key, value in head),
        "",
        *([*missing, ""] if missing else []),
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *(
            "| " + " | ".join(_format(row.get(c, "")) for c in columns) + " |"
            for row in payload["rows"]
        ),
        "",
    ]
    return "\n".join(lines)


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _cores() -> int | None:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
