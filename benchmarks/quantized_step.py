"""What 8-bit moments, INT4 bases and INT8 weights cost in a step, on one Llama block.

    python -m benchmarks.quantized_step [--sizes 350M 60M] [--repeats 15]

An ordinary update, without a refresh, and the writing of the weights apart from each other.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_jax as gj
from benchmarks import report
from benchmarks.llama_block import TRIAL_SIZES, BlockSize, random_block

NEVER = 10**9
Step = Callable[[], Any]


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["350M", "60M"], choices=TRIAL_SIZES)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    rows = [row for name in options.sizes for row in measure(name, options.repeats)]
    report.publish(
        "Updates and weights in few bits, one Llama block, milliseconds", rows, "quantized_step"
    )


def measure(name: str, repeats: int) -> list[dict[str, Any]]:
    """Rows of one block size, each group against its first."""
    size = TRIAL_SIZES[name]
    groups = {"tx.update": _updates(size), "apply_updates": _writes(size)}
    steps = {
        f"{group}/{label}": step for group, steps in groups.items() for label, step in steps.items()
    }
    times = report.interleaved(steps, repeats)
    rows = []
    for group, labels in groups.items():
        reference = times[f"{group}/{next(iter(labels))}"].best
        rows += [
            {
                "block": name,
                "what": group,
                "variant": label,
                "times the first": times[f"{group}/{label}"].best / reference,
                "ms": times[f"{group}/{label}"].best * 1e3,
                "ms, median": times[f"{group}/{label}"].median * 1e3,
            }
            for label in labels
        ]
    return rows


def _updates(size: BlockSize) -> dict[str, Step]:
    rank = size.rank
    optimizers = {
        "galore_adamw": gj.galore_adamw(1e-2, rank, update_proj_gap=NEVER),
        "+ int4 bases": gj.galore_adamw(1e-2, rank, update_proj_gap=NEVER, codec=gj.codecs.int4()),
        "+ 8-bit moments": gj.galore(1e-2, rank, NEVER, 0.25, gj.scale_by_adam8bit()),
        "galore_adamw8bit": gj.galore_adamw8bit(1e-2, rank, update_proj_gap=NEVER),
        "q_galore_adamw8bit": gj.q_galore_adamw8bit(1e-2, rank, update_proj_gap=NEVER),
    }
    return {label: _update(size, tx) for label, tx in optimizers.items()}


def _update(size: BlockSize, tx: optax.GradientTransformation) -> Step:
    gradients, params = random_block(size, 0), random_block(size, 1)
    update = jax.jit(tx.update, donate_argnums=1)
    _, first = update(gradients, tx.init(params), params)
    states = [first]

    def step() -> Any:
        updates, states[0] = update(gradients, states[0], params)
        return updates, states[0]

    return step


def _writes(size: BlockSize) -> dict[str, Step]:
    params, key = random_block(size, 1), jax.random.key(0)
    updates = jax.tree.map(lambda x: 1e-2 * x, random_block(size, 2))
    bf16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    int8 = gj.quant.quantize_params(params)

    def write(params: Any, key: Any) -> Step:
        apply = jax.jit(lambda p, u, k: gj.apply_updates(p, u, key=k))
        return lambda: apply(params, updates, key)

    return {
        "fp32": write(params, None),
        "bf16, to nearest": write(bf16, None),
        "bf16, stochastic": write(bf16, key),
        "INT8, to nearest": write(int8, None),
        "INT8, stochastic": write(int8, key),
    }


if __name__ == "__main__":
    main()
