"""Memory of a compiled training step: all gradients at once, or one block's; nothing is allocated.

    python -m benchmarks.layerwise_memory [--presets 60m 130m 350m] [--sequence 256]

One sequence per step, fp32, layers recomputed in the backward pass, buffers donated. Arguments are
weights, optimizer state and the batch; temporaries are what the compiler reserves beyond them.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_jax as gj
from benchmarks import report
from examples.llama import model, objective
from examples.llama.presets import PRESETS, Preset
from galore_jax import backward, layerwise

# Loops on a CPU otherwise copy what they update.
IN_PLACE = {"xla_cpu_copy_insertion_use_region_analysis": True}


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["60m", "130m", "350m"], choices=PRESETS)
    parser.add_argument("--sequence", type=int, default=256)
    options = parser.parse_args()
    rows = [
        row(preset, name, tx, quantized, options.sequence)
        for preset in options.presets
        for name, (tx, quantized) in optimizers(PRESETS[preset]).items()
    ]
    report.publish("Memory of a training step in GB (1e9 bytes)", rows, "layerwise_memory")


def optimizers(preset: Preset) -> dict[str, tuple[optax.GradientTransformation, bool]]:
    """Transformations, and whether the weights are stored in INT8."""
    lens = {"rank": preset.rank, "axes": gj.MatrixAxes()}
    return {
        "AdamW": (optax.adamw(1e-3), False),
        "GaLore": (gj.galore_adamw(1e-2, **lens), False),
        "8-bit GaLore": (gj.galore_adamw8bit(1e-2, **lens), False),
        "Q-GaLore": (gj.q_galore_adamw8bit(1e-2, **lens), True),
    }


def row(
    preset: str, name: str, tx: optax.GradientTransformation, quantized: bool, sequence: int
) -> dict[str, Any]:
    """One line of the table."""
    config = PRESETS[preset].model
    params = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    opt_state = jax.eval_shape(tx.init, params)
    if quantized:
        params = jax.eval_shape(gj.quant.quantize_params, params)
    tokens = jax.ShapeDtypeStruct((1, sequence), jnp.int32)
    batch = {"inputs": tokens, "targets": tokens}
    analyses = {
        kind: compiled(step, params, opt_state, batch) for kind, step in steps(config, tx).items()
    }
    arguments = analyses["ordinary"].argument_size_in_bytes
    temporaries = {k: analysis.temp_size_in_bytes / 1e9 for k, analysis in analyses.items()}
    return {"model": preset, "optimizer": name, "arguments": arguments / 1e9, **temporaries}


def steps(
    config: model.LlamaConfig, tx: optax.GradientTransformation
) -> dict[str, Callable[..., Any]]:
    """The ways to train."""
    loss = functools.partial(objective.loss, dataclasses.replace(config, remat=True))

    def ordinary(params: Any, opt_state: Any, batch: Any) -> Any:
        value, gradients = gj.quant.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return gj.apply_updates(params, updates, key=None), opt_state, value

    pieces = (
        lambda params, batch: model.embed(config, params, batch["inputs"]),
        functools.partial(model.block, config),
        functools.partial(objective.head_loss, config),
    )
    return {
        "ordinary": ordinary,
        "layer-wise": layerwise.train_step(*pieces, tx, pullback=formed),
        "layer-wise, projected": layerwise.train_step(*pieces, tx),
        "layer-wise, clipped": layerwise.train_step(*pieces, tx, clip_norm=1.0, pullback=formed),
    }


def formed(fn: Any, params: Any, opt_state: Any, *inputs: Any, layer: Any = 0) -> Any:
    """A pullback that knows of no lens, and forms every gradient."""
    del opt_state, layer
    return backward.pullback(fn, params, (), *inputs)


def compiled(step: Callable[..., Any], *arguments: Any) -> Any:
    """The memory analysis of a compiled step."""
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments)
    return lowered.compile(compiler_options=IN_PLACE).memory_analysis()


if __name__ == "__main__":
    main()
