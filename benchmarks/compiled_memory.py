"""Memory of whole training steps, compiled for an H100 where there is none; nothing is allocated.

python -m benchmarks.compiled_memory [--presets 350m 1b 7b] [--sequence 2048]

bf16 activations and weights (INT8 for Q-GaLore), every parameter trains, one sequence per step,
attention scores of 256 queries and logits of 256 tokens at a time, buffers donated.
"""

import argparse
import dataclasses
import functools
from typing import Any, NamedTuple

from benchmarks import cuda_target  # isort: skip  (sets the environment of what follows)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import galore_jax as gj
from benchmarks import report
from examples.llama import model, objective
from examples.llama.presets import PRESETS

# Fewer copies of what loops change in place.
_IN_PLACE = {"xla_gpu_copy_insertion_use_region_analysis": True}


class Recipe(NamedTuple):
    """An optimizer, how its weights are stored, and whether layers are updated one by one."""

    tx: optax.GradientTransformation
    int8: bool
    layerwise: bool


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["350m", "1b", "7b"], choices=PRESETS)
    parser.add_argument("--sequence", type=int, default=2048)
    options = parser.parse_args()
    rows = []
    for preset in options.presets:
        for name, recipe in recipes(preset).items():
            rows.append(
                {"model": preset, "step": name, **measured(preset, recipe, options.sequence)}
            )
            print(rows[-1], flush=True)
    title = f"Compiled for an H100, one sequence of {options.sequence}, GB (1e9 bytes)"
    report.publish(title, rows, "compiled_memory")


def recipes(preset: str) -> dict[str, Recipe]:
    """What is compared."""
    rank = PRESETS[preset].rank

    def lens(rank: int) -> dict[str, Any]:
        return {"rank": rank, "axes": gj.MatrixAxes(-2, -1)}

    found = {
        "AdamW": Recipe(optax.adamw(1e-3), False, False),
        f"8-bit GaLore, r {rank}, layer-wise": Recipe(
            gj.galore_adamw8bit(1e-2, **lens(rank)), False, True
        ),
    }
    for r in (rank, rank // 2):
        tx = gj.q_galore_adamw8bit(1e-2, **lens(r))
        found[f"Q-GaLore, r {r}, layer-wise"] = Recipe(tx, True, True)
    return found


def measured(preset: str, recipe: Recipe, sequence: int) -> dict[str, float]:
    """Bytes of arguments and temporaries, and the peak."""
    config = dataclasses.replace(
        PRESETS[preset].model,
        max_seq_len=sequence,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        remat=True,
        attention="xla",
        head_chunk=256,
        attention_chunk=256,
    )
    place = NamedSharding(Mesh(np.array([cuda_target.h100()]), ("x",)), PartitionSpec())
    params = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    state = jax.eval_shape(recipe.tx.init, params)
    if recipe.int8:
        params = jax.eval_shape(gj.quant.quantize_params, params)
    tokens = jax.ShapeDtypeStruct((1, sequence), jnp.int32)
    batch = {"inputs": tokens, "targets": tokens}
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (params, state, batch, key),
    )
    step = layerwise_step(config, recipe.tx) if recipe.layerwise else plain_step(config, recipe.tx)
    jitted = jax.jit(step, donate_argnums=(0, 1), compiler_options=_IN_PLACE)
    compiled = jitted.lower(*arguments).compile()
    memory = compiled.memory_analysis()
    return {
        "weights and state": memory.argument_size_in_bytes / 1e9,
        "temporaries": memory.temp_size_in_bytes / 1e9,
        "peak": cuda_target.peak_bytes(compiled) / 1e9,
    }


def plain_step(config: model.LlamaConfig, tx: optax.GradientTransformation) -> Any:
    """All gradients, then the update."""

    def step(params: Any, state: Any, batch: Any, key: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(functools.partial(objective.loss, config))(params, batch)
        updates, state = tx.update(grads, state, params)
        return gj.apply_updates(params, updates, key=key), state, loss

    return step


def layerwise_step(config: model.LlamaConfig, tx: optax.GradientTransformation) -> Any:
    """One block at a time, with the projected backward pass inside."""
    return gj.layerwise.train_step(
        lambda params, batch: model.embed(config, params, batch["inputs"]),
        functools.partial(model.block, config),
        functools.partial(objective.head_loss, config),
        tx,
    )


if __name__ == "__main__":
    main()
