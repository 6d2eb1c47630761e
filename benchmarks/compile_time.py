"""Seconds to compile the update of a 24-layer model; nothing is allocated.

python -m benchmarks.compile_time [--preset 350m] [--repeats 3]
"""

import argparse
import functools
import time
from typing import Any

import jax
import numpy as np
import optax

import galore_jax as gj
from benchmarks import report
from examples.llama import model
from examples.llama.presets import PRESETS

THEIRS = "optax.contrib.galore, separate layers"


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="350m", choices=PRESETS)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    stacked = jax.eval_shape(functools.partial(model.init, preset.model), jax.random.key(0))
    separate = {**stacked, "blocks": unstack(stacked["blocks"], preset.model.num_layers)}
    ours = gj.galore(1e-2, preset.rank, axes=gj.MatrixAxes())
    theirs = optax.contrib.galore(1e-2, preset.rank)
    cases = {
        "galore_jax, stacked layers": (ours, stacked),
        "galore_jax, separate layers": (ours, separate),
        THEIRS: (theirs, separate),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.repeats):
        for name, case in cases.items():
            seconds[name].append(compile_seconds(*case))
    rows = [
        {
            "update": name,
            "÷ optax": min(times) / min(seconds[THEIRS]),
            "leaves": len(jax.tree.leaves(cases[name][1])),
            "min": min(times),
            "median": float(np.median(times)),
        }
        for name, times in seconds.items()
    ]
    layers = preset.model.num_layers
    title = f"Seconds to trace and compile tx.update, Llama {options.preset}, {layers} layers"
    report.publish(title, rows, "compile_time")


def compile_seconds(tx: optax.GradientTransformation, params: Any) -> float:
    """Traces, lowers and compiles one update, with all caches emptied."""
    jax.clear_caches()
    state = jax.eval_shape(tx.init, params)
    start = time.perf_counter()
    jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
    return time.perf_counter() - start


def unstack(blocks: Any, layers: int) -> list[Any]:
    """One tree per layer."""

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)

    return [jax.tree.map(one, blocks) for _ in range(layers)]


if __name__ == "__main__":
    main()
