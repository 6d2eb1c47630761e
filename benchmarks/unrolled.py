"""Layers as separate leaves against stacked ones: memory and compile time; nothing is allocated.

    python -m benchmarks.unrolled [--presets 60m 350m] [--sequence 256] [--targets cpu h100]

Whole training steps, one sequence, layers recomputed in the backward pass, buffers donated; fp32 on
a CPU, bf16 on an H100 where there is none. Where layers are separate leaves, the compiler may use
up each gradient as soon as it is there, unless something needs them all.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
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
from examples.llama.presets import PRESETS, Preset
from galore_jax import layerwise

MAX_NORM = 1.0


class Target(NamedTuple):
    """What is compiled for: the device, the dtype of weights and activations, compiler options."""

    device: Any
    dtype: Any
    options: dict[str, Any]


# Loops on a CPU otherwise copy what they update.
TARGETS: dict[str, Callable[[], Target]] = {
    "cpu": lambda: Target(
        jax.devices("cpu")[0], jnp.float32, {"xla_cpu_copy_insertion_use_region_analysis": True}
    ),
    "h100": lambda: Target(cuda_target.h100(), jnp.bfloat16, {}),
}


class Form(NamedTuple):
    """How layers are held and trained.

    Args:
      hold: Stacked layers -> the entry of the parameters.
      step: (config, tx) -> training step.
      clipping: (config, tx) -> the same with an exact clip by global norm, and its optimizer.
    """

    hold: Callable[[Any], Any]
    step: Callable[..., Callable[..., Any]]
    clipping: Callable[..., tuple[Callable[..., Any], optax.GradientTransformation]]


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["60m", "350m"], choices=PRESETS)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--targets", nargs="+", default=["cpu"], choices=TARGETS)
    options = parser.parse_args()
    for name in options.targets:
        rows = []
        for preset in options.presets:
            for case, made in cases(PRESETS[preset]).items():
                figures = measured(
                    PRESETS[preset],
                    *made,
                    sequence=options.sequence,
                    repeats=options.repeats,
                    target=TARGETS[name](),
                )
                optimizer, layers, clip = case
                rows.append(
                    {
                        "model": preset,
                        "optimizer": optimizer,
                        "layers": layers,
                        "clip": clip,
                        **figures,
                    }
                )
                print(rows[-1], flush=True)
        title = f"Training steps compiled for {name}, one sequence of {options.sequence}, GB"
        report.publish(title, rows, f"unrolled_{name}")


def cases(preset: Preset) -> dict[tuple[str, str, str], tuple[Form, Any, bool]]:
    """What is compared: optimizer, layers, clip."""
    optimizers = {
        "AdamW": optax.adamw(1e-3),
        "GaLore": gj.galore_adamw(1e-2, preset.rank, axes=gj.MatrixAxes()),
    }
    return {
        (name, held, "exact" if clipped else ""): (form, tx, clipped)
        for name, tx in optimizers.items()
        for held, form in FORMS.items()
        for clipped in (False, True)
    }


def measured(
    preset: Preset,
    form: Form,
    tx: Any,
    clipped: bool,
    *,
    sequence: int,
    repeats: int,
    target: Target,
) -> dict[str, float]:
    """Bytes of arguments and temporaries, and the least seconds that tracing and compiling took."""
    config = dataclasses.replace(
        preset.model,
        max_seq_len=sequence,
        dtype=target.dtype,
        param_dtype=target.dtype,
        remat=True,
        attention="xla",
    )
    step, tx = form.clipping(config, tx) if clipped else (form.step(config, tx), tx)
    params = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    params = {**params, "blocks": jax.eval_shape(form.hold, params["blocks"])}
    tokens = jax.ShapeDtypeStruct((1, sequence), jnp.int32)
    batch = {"inputs": tokens, "targets": tokens}
    place = NamedSharding(Mesh(np.array([target.device]), ("x",)), PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (params, jax.eval_shape(tx.init, params), batch),
    )
    seconds = []
    for _ in range(repeats):
        jax.clear_caches()
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments)
        memory = lowered.compile(compiler_options=target.options).memory_analysis()
        seconds.append(time.perf_counter() - start)
    return {
        "weights and state": memory.argument_size_in_bytes / 1e9,
        "temporaries": memory.temp_size_in_bytes / 1e9,
        "seconds to compile": min(seconds),
    }


def ordinary(loss_fn: Callable[..., jax.Array], config: model.LlamaConfig, tx: Any) -> Any:
    """All gradients, then the update."""

    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        loss, gradients = jax.value_and_grad(functools.partial(loss_fn, config))(params, batch)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def clipped_ordinary(loss_fn: Callable[..., jax.Array], config: model.LlamaConfig, tx: Any) -> Any:
    """The same behind a clip."""
    tx = optax.chain(optax.clip_by_global_norm(MAX_NORM), tx)
    return ordinary(loss_fn, config, tx), tx


def by_layer(config: model.LlamaConfig, tx: Any, clip_norm: float | None = None) -> Any:
    """One block at a time."""
    return layerwise.train_step(
        lambda params, batch: model.embed(config, params, batch["inputs"]),
        functools.partial(model.block, config),
        functools.partial(objective.head_loss, config),
        tx,
        clip_norm=clip_norm,
    )


def separate_loss(config: model.LlamaConfig, params: Any, batch: Any) -> jax.Array:
    """The loss of a model whose layers have names."""
    block = jax.checkpoint(functools.partial(model.block, config))
    x = model.embed(config, params, batch["inputs"])
    for layer in params["blocks"].values():
        x = block(layer, x)
    return objective.head_loss(config, params, x, batch)


def named(blocks: Any) -> dict[str, Any]:
    """One tree per layer."""
    layers = jax.tree.leaves(blocks)[0].shape[0]
    return {str(i): jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(layers)}


FORMS = {
    "stacked": Form(
        lambda blocks: blocks,
        functools.partial(ordinary, objective.loss),
        functools.partial(clipped_ordinary, objective.loss),
    ),
    # A refresh is one conditional for all of them, which waits for all gradients.
    "separate": Form(
        named,
        functools.partial(ordinary, separate_loss),
        functools.partial(clipped_ordinary, separate_loss),
    ),
    "stacked, layer-wise": Form(
        lambda blocks: blocks,
        by_layer,
        lambda config, tx: (by_layer(config, tx, MAX_NORM), tx),
    ),
}


if __name__ == "__main__":
    main()
