"""Seconds to compile the update of a 24-layer model; nothing is allocated.

python -m benchmarks.compile_time [--size 350M] [--repeats 3]
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_jax as gj
from benchmarks import report
from benchmarks.llama_block import SIZES


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="350M", choices=SIZES)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    size = SIZES[options.size]
    stacked = {n: _abstract((size.layers, *shape)) for n, shape in size.shapes.items()}
    unrolled = {
        f"{name}/{layer}": _abstract(shape)
        for name, shape in size.shapes.items()
        for layer in range(size.layers)
    }
    ours, theirs = gj.galore(1e-2, size.rank, axes=gj.MatrixAxes()), optax.contrib.galore(1e-2, size.rank)
    cases = {
        "galore_jax, stacked layers": (ours, stacked),
        "galore_jax, separate layers": (ours, unrolled),
        "optax.contrib.galore, separate layers": (theirs, unrolled),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.repeats):
        for name, case in cases.items():
            seconds[name].append(compile_seconds(*case))
    rows = [
        {
            "update": name,
            "leaves": len(cases[name][1]),
            "min": min(times),
            "median": float(np.median(times)),
        }
        for name, times in seconds.items()
    ]
    title = f"Seconds to trace and compile tx.update, {options.size}, {size.layers} layers"
    report.publish(title, rows, "compile_time")


def compile_seconds(tx: optax.GradientTransformation, params: Any) -> float:
    """Traces, lowers and compiles one update, with all caches emptied."""
    jax.clear_caches()
    state = jax.eval_shape(tx.init, params)
    start = time.perf_counter()
    jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
    return time.perf_counter() - start


def _abstract(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


if __name__ == "__main__":
    main()
