"""Honest timing and tables: interleaved runs, minimum and median, hardware and load in the head."""

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

PEERS = ("torch", "galore-torch", "pytorch-optimizer", "bitsandbytes", "torchao")


def interleaved(
    functions: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, tuple[float, float]]:
    """Runs all functions in turn, `repeats` times, after one warm-up each.

    Machines drift; in turn, they drift for all alike.

    Returns:
      Minimum and median seconds per function.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: (min(times), float(np.median(times))) for name, times in seconds.items()}


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
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **versions,
    }


def publish(title: str, rows: Sequence[dict[str, Any]], name: str) -> None:
    """Prints a Markdown table with its environment, and writes both to benchmarks/results."""
    head = environment()
    columns = list(rows[0])
    lines = [
        f"### {title}",
        "",
        ", ".join(f"{key} {_format(value)}" for key, value in head.items()),
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(_format(row.get(c, "")) for c in columns) + " |" for row in rows),
        "",
    ]
    text = "\n".join(lines)
    print(text, flush=True)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"{name}.md").write_text(text)
    payload = {"title": title, "environment": head, "rows": list(rows)}
    (results / f"{name}.json").write_text(json.dumps(payload, indent=1) + "\n")


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
