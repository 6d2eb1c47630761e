"""Bytes that accumulating gradients over micro-batches keeps, for the Llama presets.

    python -m benchmarks.accumulate [--presets 60m 350m 1b 7b]

Nothing is allocated. `optax.MultiSteps` keeps a sum in the shape of every parameter, in fp32 unless
told otherwise; `galore_jax.accumulate` keeps fp32 sums of what the lens projects, fp32 sums of all
other leaves, and the bases of the window.
"""

import argparse
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_jax as gj
from benchmarks import report
from examples.llama import model
from examples.llama.presets import PRESETS

EVERY = 8


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["60m", "350m", "1b", "7b"])
    presets = parser.parse_args().presets
    report.publish(
        "Buffers of gradient accumulation in GB (1e9 bytes), bf16 weights",
        [_buffers(name) for name in presets],
        "accumulate_buffers",
    )
    report.publish(
        "Optimizer state with these buffers in it, GB",
        [_states(name) for name in presets],
        "accumulate_state",
    )


def _optimizers(name: str) -> dict[str, optax.GradientTransformation]:
    """GaLore with bases in fp32, bf16 and INT4; the rank is the paper's."""
    rank, axes = PRESETS[name].rank, {"axes": gj.MatrixAxes()}
    return {
        "galore_adamw": gj.galore_adamw(1e-2, rank, **axes),
        "galore_adamw8bit": gj.galore_adamw8bit(1e-2, rank, **axes),
        "q_galore_adamw8bit": gj.q_galore_adamw8bit(1e-2, rank, **axes),
    }


def _wrapped(tx: optax.GradientTransformation) -> dict[str, optax.GradientTransformation]:
    """The ways to accumulate, by name."""
    return {
        "MultiSteps": optax.MultiSteps(tx, EVERY).gradient_transformation(),
        "MultiSteps, bf16 sums": optax.MultiSteps(
            tx, EVERY, accumulator_dtype=jnp.bfloat16
        ).gradient_transformation(),
        "accumulate": gj.accumulate(tx, EVERY),
    }


def _buffers(name: str) -> dict[str, Any]:
    """What is kept beside the state of the optimizer; for MultiSteps it is the same for all."""
    params = _params(name)
    row: dict[str, Any] = {"model": name, "rank": PRESETS[name].rank}
    for optimizer, tx in _optimizers(name).items():
        alone = _bytes(tx, params)
        for way, wrapped in _wrapped(tx).items():
            label = f"{way}, {optimizer}" if way == "accumulate" else way
            row[label] = (_bytes(wrapped, params) - alone) / 1e9
    return row


def _states(name: str) -> dict[str, Any]:
    """Of the optimizers with and without accumulation."""
    params = _params(name)
    row: dict[str, Any] = {"model": name, "rank": PRESETS[name].rank}
    for optimizer in ("galore_adamw", "q_galore_adamw8bit"):
        tx = _optimizers(name)[optimizer]
        row[optimizer] = _bytes(tx, params) / 1e9
        for way, wrapped in _wrapped(tx).items():
            row[f"{optimizer}, {way}"] = _bytes(wrapped, params) / 1e9
    return row


def _params(name: str) -> Any:
    params = jax.eval_shape(functools.partial(model.init, PRESETS[name].model), jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)


def _bytes(tx: optax.GradientTransformation, params: Any) -> int:
    state = jax.eval_shape(tx.init, params)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


if __name__ == "__main__":
    main()
