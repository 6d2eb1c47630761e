"""Whole training steps of a Llama: AdamW, GaLore, with the projected backward pass, layer-wise.

    python -m benchmarks.training_step [--presets 20m 60m] [--repeats 4] [--batch 8] [--seq-len 256]

All methods are alive at once and take turns; a GPU's figures are those of `benchmarks.throughput`.
"""

import argparse
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_jax as gj
from benchmarks import flops, report
from examples.llama import model, objective
from examples.llama.presets import PRESETS

GAP = 200
# Without it the CPU backend copies stacked arrays that could be changed in place.
CPU_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}
# Between the sizes of the paper: 20.5 million parameters.
SMALL = dataclasses.replace(
    PRESETS["60m"],
    model=model.LlamaConfig(
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=1024,
        num_layers=8,
        num_heads=6,
        max_seq_len=1024,
    ),
    rank=96,
)
SIZES = {"20m": SMALL, **PRESETS}


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="*", default=["20m", "60m"], choices=SIZES)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--counted", nargs="*", default=["350m", "1b", "7b"], choices=SIZES)
    options = parser.parse_args()
    rows = [row for name in options.presets for row in timed(name, options)]
    if rows:
        title = "Whole training step, fp32, rematerialised layers"
        report.publish(title, rows, "training_step")
    rows = [row for name in (*options.presets, *options.counted) for row in counted(name, options)]
    report.publish("Operations of a training step (matrix products)", rows, "training_flops")


def steps(name: str, options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Model and batch of a preset, and per method its optimizer and its step."""
    preset = SIZES[name]
    llama = dataclasses.replace(preset.model, remat=True, attention="xla")
    loss_fn = functools.partial(objective.loss, llama)
    galore = gj.galore_adamw(1e-2, preset.rank, update_proj_gap=GAP, axes=gj.MatrixAxes(-2, -1))
    full = jax.value_and_grad(loss_fn)
    methods = {
        "AdamW": (optax.adamw(1e-3), lambda p, s, b: full(p, b)),
        "GaLore, full gradient": (galore, lambda p, s, b: full(p, b)),
        "GaLore, projected backward": (galore, gj.projected_value_and_grad(loss_fn, galore)),
    }
    found: dict[str, Any] = {
        method: (tx, functools.partial(_step, tx, gradient))
        for method, (tx, gradient) in methods.items()
    }
    layerwise = gj.layerwise.train_step(
        lambda params, batch: model.embed(llama, params, batch["inputs"]),
        functools.partial(model.block, llama),
        functools.partial(objective.head_loss, llama),
        galore,
    )
    found["GaLore, layer-wise"] = galore, layerwise
    return llama, (options.batch, options.seq_len), found


def _step(tx: Any, gradient: Any, params: Any, state: Any, batch: Any) -> Any:
    loss, grads = gradient(params, state, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def timed(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Steps in turn; a refresh is what a step with all bases due takes beyond an ordinary one."""
    llama, shape, methods = steps(name, options)
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, llama.vocab_size, (shape[0], shape[1] + 1)), jnp.int32)
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
    compiler_options = CPU_OPTIONS if jax.default_backend() == "cpu" else None
    runs = {}
    for method, (tx, step) in methods.items():
        compiled = jax.jit(step, donate_argnums=(0, 1), compiler_options=compiler_options)
        params = model.init(llama, jax.random.key(0))
        held = [compiled(params, tx.init(params), batch)[:2]]
        runs[method] = functools.partial(_run, compiled, held, batch, due=False)
        if method != "AdamW":
            runs[f"{method}, refresh"] = functools.partial(_run, compiled, held, batch, due=True)
    timings = report.interleaved(runs, options.repeats)
    times = {name: timing.best for name, timing in timings.items()}
    tokens = shape[0] * shape[1]
    rows = []
    for method in methods:
        refresh = max(times.get(f"{method}, refresh", times[method]) - times[method], 0.0)
        mean = times[method] + refresh / GAP
        rows.append(
            {
                "preset": name,
                "method": method,
                "tokens/s ÷ AdamW": times["AdamW"] / mean,
                "tokens/s": tokens / mean,
                "step, s": times[method],
                "refresh, s": refresh,
                "step, s, median": timings[method].median,
            }
        )
    return rows


def _run(compiled: Any, held: list[Any], batch: Any, *, due: bool) -> Any:
    params, state = held[0]
    if due:
        state = jax.block_until_ready(_all_due(state))
    held[0] = compiled(params, state, batch)[:2]
    return held[0]


def _all_due(state: Any) -> Any:
    lens = state[0]
    refresh = lens.refresh_state
    due = jax.tree.map(jnp.ones_like, refresh.due)
    return (lens._replace(refresh_state=refresh._replace(due=due)), *state[1:])


def counted(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Operations of the traced steps; nothing is allocated."""
    llama, shape, methods = steps(name, options)
    params = jax.eval_shape(functools.partial(model.init, llama), jax.random.key(0))
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = {"inputs": ids, "targets": ids}
    found = {}
    for method, (tx, step) in methods.items():
        jaxpr = jax.make_jaxpr(step)(params, jax.eval_shape(tx.init, params), batch)
        found[method] = flops.of_products(jaxpr.jaxpr)
    return [
        {
            "preset": name,
            "method": method,
            "÷ AdamW": ordinary / found["AdamW"][0],
            "TFLOP": ordinary / 1e12,
        }
        for method, (ordinary, _) in found.items()
    ]


if __name__ == "__main__":
    main()
