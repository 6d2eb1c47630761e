"""Bytes of optimizer state for the Llama presets; nothing is allocated.

python -m benchmarks.state_bytes
"""

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


def main() -> None:
    """Command line program."""
    rows = [_row(name) for name in ("60m", "130m", "350m", "1b", "7b")]
    report.publish("Optimizer state in GB (1e9 bytes), fp32 moments", rows, "state_bytes")


def _row(name: str) -> dict[str, Any]:
    preset = PRESETS[name]
    params = jax.eval_shape(functools.partial(model.init, preset.model), jax.random.key(0))
    rank, axes = preset.rank, gj.MatrixAxes()
    bf16 = {"axes": axes, "codec": gj.codecs.cast(jnp.bfloat16)}
    optimizers = {
        "optax.adamw": optax.adamw(1e-2),
        "galore_adamw": gj.galore_adamw(1e-2, rank, axes=axes),
        "bf16 projectors": gj.galore_adamw(1e-2, rank, **bf16),
        "side=long, bf16": gj.galore_adamw(1e-2, rank, side="long", **bf16),
        "galore_adafactor, bf16": gj.galore_adafactor(1e-2, rank, **bf16),
        "galore_lion, bf16": gj.galore_lion(1e-2, rank, **bf16),
    }
    sizes = {key: _bytes(tx, params) / 1e9 for key, tx in optimizers.items()}
    return {"model": name, "rank": rank, **sizes}


def _bytes(tx: optax.GradientTransformation, params: Any) -> int:
    state = jax.eval_shape(tx.init, params)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


if __name__ == "__main__":
    main()
