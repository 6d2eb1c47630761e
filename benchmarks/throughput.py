"""Tokens per second, refresh and peak memory of whole training steps, for a GPU.

    python -m benchmarks.throughput [--presets 60m 350m 1b] [--batch 32] [--seq-len 1024]

AdamW, optax.contrib.galore, and GaLore with the gradient formed or projected in the backward pass.
Weights, gradients and optimizer state in fp32, activations in bf16, rematerialised layers. Each
line is a process of its own, so that its peak is its own, and runs on the default device. The
refresh counts with one step in 200.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_jax as gj
from benchmarks import device_memory, isolated, report
from examples.llama import model, objective, optimizers
from examples.llama.presets import PRESETS, Preset

GAP = 200
REFRESHES = 3
# Loops on a CPU otherwise copy what they update.
CPU_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}
# The optimizer's name in the example, and whether the backward pass projects.
METHODS = {
    "AdamW": ("adamw", False),
    "optax.contrib.galore": ("optax_galore", False),
    "GaLore, full gradient": ("galore_adamw", False),
    "GaLore, projected backward": ("galore_adamw", True),
}
COLUMNS = (
    "refresh ÷ step",
    "tokens/s",
    "step, ms",
    "step, ms, median",
    "refresh, ms",
    "refresh, ms, median",
    "first loss",
    "last loss",
    "peak, GB",
    "compile, s",
    "note",
)
Row = dict[str, Any]


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["60m", "350m", "1b"], choices=PRESETS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    shape = options.batch, options.seq_len
    rows = [row for preset in options.presets for row in compare(preset, options, shape)]
    title = f"Whole training step, {options.batch} x {options.seq_len} tokens, bf16 activations"
    report.publish(title, rows, "throughput")


def compare(preset: str, options: argparse.Namespace, shape: tuple[int, int]) -> list[Row]:
    """All methods on one preset; what does not fit the device says so."""
    found = {m: isolated.row(measure, preset, m, shape, options.steps) for m in options.methods}
    reference = found.get("AdamW", {}).get("tokens/s", "")
    rows = []
    for method, measured in found.items():
        speed = measured.get("tokens/s", "")
        ratio = speed / reference if speed and reference else ""
        row = {"preset": preset, "method": method, "tokens/s ÷ AdamW": ratio}
        rows.append(row | {column: measured.get(column, "") for column in COLUMNS})
    return rows


def measure(preset: str, method: str, shape: tuple[int, int], steps: int) -> Row:
    """One line of the table; meant for a process of its own."""
    recipe = PRESETS[preset]
    llama = dataclasses.replace(recipe.model, max_seq_len=shape[1], dtype=jnp.bfloat16, remat=True)
    tx, step = train_step(recipe, llama, method)
    on_cpu = jax.default_backend() == "cpu"
    jitted = jax.jit(step, donate_argnums=(0, 1), compiler_options=CPU_OPTIONS if on_cpu else None)
    ids = np.random.default_rng(0).integers(0, llama.vocab_size, (shape[0], shape[1] + 1))
    ids = jnp.asarray(ids, jnp.int32)
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
    params = jax.jit(functools.partial(model.init, llama))(jax.random.key(0))
    state = jax.jit(tx.init)(params)
    began = time.perf_counter()
    compiled = jitted.lower(params, state, batch).compile()
    compile_seconds = time.perf_counter() - began

    ordinary, refreshing, losses = [], [], []
    for number in range(1 + steps + REFRESHES):
        due = number > steps
        if due:
            state = jax.block_until_ready(refresh_is_due(state))
        began = time.perf_counter()
        params, state, loss = jax.block_until_ready(compiled(params, state, batch))
        (refreshing if due else ordinary).append(time.perf_counter() - began)
        losses.append(float(loss))
    ordinary = ordinary[1:]  # the first one refreshes, too

    best, median = min(ordinary), float(np.median(ordinary))
    extra = 0.0 if method == "AdamW" else max(min(refreshing) - best, 0.0)
    typical = 0.0 if method == "AdamW" else max(float(np.median(refreshing)) - median, 0.0)
    return {
        "refresh ÷ step": extra / best,
        "tokens/s": shape[0] * shape[1] / (best + extra / GAP),
        "step, ms": best * 1e3,
        "step, ms, median": median * 1e3,
        "refresh, ms": extra * 1e3,
        "refresh, ms, median": typical * 1e3,
        "first loss": losses[0],
        "last loss": losses[-1],
        "compile, s": compile_seconds,
        **device_memory.used(),
    }


def train_step(
    recipe: Preset, llama: model.LlamaConfig, method: str
) -> tuple[optax.GradientTransformationExtraArgs, Callable[..., Any]]:
    """The optimizer of a method, and a step with it."""
    name, projected = METHODS[method]
    options = optimizers.resolve(
        optimizers.OptimizerOptions(name), rank=recipe.rank, gap=GAP, scale=recipe.scale
    )
    # Without the guard that the example puts around it.
    tx = optimizers.make_layerwise_optimizer(options, lambda count: 1e-3, seed=0)
    loss_fn = functools.partial(objective.loss, llama)
    full = jax.value_and_grad(loss_fn)
    differentiate = (
        gj.projected_value_and_grad(loss_fn, tx)
        if projected
        else lambda params, state, batch: full(params, batch)
    )

    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, gradients = differentiate(params, state, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return tx, step


def refresh_is_due(state: Any) -> Any:
    """The state with every basis due; optax's refreshes when its count is a multiple of the gap."""

    def due(node: Any) -> Any:
        if isinstance(node, optax.contrib.GaLoreState):
            return node._replace(count=jnp.zeros_like(node.count))
        if isinstance(node, gj.LowRankState):
            every = jax.tree.map(jnp.ones_like, node.refresh_state.due)
            return node._replace(refresh_state=node.refresh_state._replace(due=every))
        return node

    lenses = optax.contrib.GaLoreState, gj.LowRankState
    return jax.tree.map(due, state, is_leaf=lambda node: isinstance(node, lenses))


if __name__ == "__main__":
    main()
