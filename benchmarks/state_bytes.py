"""Bytes of weights and optimizer state for the Llama presets; nothing is allocated.

    python -m benchmarks.state_bytes [--presets 60m 130m 350m 1b 7b]

The papers' figures beside ours are theirs: GaLore, table 2, for AdamW and GaLore (7B: table 3,
whose GaLore is 8-bit), and Q-GaLore, tables 1 and 2. They are estimates, but for Q-GaLore's 7B,
which is a measured footprint with activations.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_jax as gj
from benchmarks import report
from examples.llama import model
from examples.llama.presets import PRESETS

# Gigabytes as printed: weights and optimizer state.
PAPERS = {
    "60m": {"AdamW": 0.36, "GaLore": 0.24, "Q-GaLore": 0.18},
    "130m": {"AdamW": 0.76, "GaLore": 0.52, "Q-GaLore": 0.39},
    "350m": {"AdamW": 2.06, "GaLore": 1.22, "Q-GaLore": 0.88},
    "1b": {"AdamW": 7.80, "GaLore": 4.38, "Q-GaLore": 3.08},
    "7b": {"8-bit GaLore": 18.0, "Q-GaLore": 15.0},
}


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=list(PAPERS), choices=PAPERS)
    presets = parser.parse_args().presets
    totals = [_totals(name) for name in presets]
    report.publish("Weights and optimizer state in GB (1e9 bytes), bf16 weights", totals, "memory")
    parts = [row for name in presets for row in _parts(name)]
    report.publish("The same by role, GB", parts, "memory_by_role")
    states = [_states(name) for name in presets]
    report.publish("Optimizer state in GB (1e9 bytes), fp32 moments", states, "state_bytes")


def _params(name: str) -> Any:
    config = PRESETS[name].model
    params = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)


def _recipes(name: str) -> dict[str, gj.memory.Memory]:
    """AdamW as the papers count it, and our 16-bit, 8-bit and Q-GaLore."""
    rank, options = PRESETS[name].rank, {"axes": gj.MatrixAxes()}
    params = _params(name)
    int8 = jax.eval_shape(gj.quant.quantize_params, params)
    bf16 = {"codec": gj.codecs.cast("bfloat16"), "state_dtype": "bfloat16"}
    return {
        "AdamW": gj.memory.estimate(optax.adamw(1e-2), params),
        "GaLore": gj.memory.estimate(gj.galore_adamw(1e-2, rank, **bf16, **options), params),
        "8-bit GaLore": gj.memory.estimate(gj.galore_adamw8bit(1e-2, rank, **options), params),
        "Q-GaLore": gj.memory.estimate(gj.q_galore_adamw8bit(1e-2, rank, **options), int8),
    }


def _totals(name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"model": name, "rank": PRESETS[name].rank}
    for recipe, memory in _recipes(name).items():
        row |= {recipe: memory.total / 1e9, f"{recipe}, paper": PAPERS[name].get(recipe, "")}
    return row


def _parts(name: str) -> list[dict[str, Any]]:
    return [
        {
            "model": name,
            "recipe": recipe,
            "weights": memory.weights / 1e9,
            "projectors": memory.projectors / 1e9,
            "moments": (memory.state - memory.projectors - memory.refresh) / 1e9,
            "refresh": memory.refresh / 1e9,
            "total": memory.total / 1e9,
        }
        for recipe, memory in _recipes(name).items()
    ]


def _states(name: str) -> dict[str, Any]:
    """State alone, with fp32 moments."""
    rank, params = PRESETS[name].rank, _params(name)
    axes = {"axes": gj.MatrixAxes()}
    bf16 = {"codec": gj.codecs.cast("bfloat16"), **axes}
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
    optimizers = {
        "optax.adamw": optax.adamw(1e-2),
        "galore_adamw": gj.galore_adamw(1e-2, rank, **axes),
        "bf16 projectors": gj.galore_adamw(1e-2, rank, **bf16),
        "side=long, bf16": gj.galore_adamw(1e-2, rank, side="long", **bf16),
        "galore_adafactor, bf16": gj.galore_adafactor(1e-2, rank, **bf16),
        "galore_lion, bf16": gj.galore_lion(1e-2, rank, **bf16),
    }
    sizes = {key: gj.memory.estimate(tx, wide).state / 1e9 for key, tx in optimizers.items()}
    return {"model": name, "rank": rank, **sizes}


if __name__ == "__main__":
    main()
