"""Ordinary step and refresh on the matrices of one Llama block, against peers in the same run.

    python -m benchmarks.optimizer_step [--sizes 60M 130M 350M] [--repeats 5]

A refresh is the time of a step that recomputes every basis minus that of one that recomputes
none; `warm` starts from the previous basis, `cold` is the first one. galore-torch and
pytorch-optimizer join when they are installed. Ratios are of minima.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_jax as gj
from benchmarks import report, torch_peers
from benchmarks.llama_block import TRIAL_SIZES, BlockSize, random_block

NEVER = 10**9
Step = Callable[[], Any]


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["60M", "130M", "350M"], choices=TRIAL_SIZES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="optimizer_step", help="of the files in results/")
    options = parser.parse_args()
    rows, left_out = [], {}
    for name in options.sizes:
        found, left_out = measure(name, options.repeats)
        rows += found
    title = "Optimizer step on one Llama block, fp32, milliseconds"
    report.publish(title, rows, options.name, left_out)


def measure(name: str, repeats: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of one block size, against optax.contrib.galore; and the peers that are left out."""
    size = TRIAL_SIZES[name]
    theirs, left_out = torch_peers.torch_optimizers(size)
    optimizers = _optimizers(size) | theirs
    steps: dict[str, Step] = {"two products": _products(size)}
    for optimizer, kinds in optimizers.items():
        steps |= {f"{optimizer}/{kind}": step for kind, step in kinds.items()}
    times = report.interleaved(steps, repeats)
    best = {key: timing.best * 1e3 for key, timing in times.items()}
    median = {key: timing.median * 1e3 for key, timing in times.items()}

    def refresh(of: dict[str, float], optimizer: str, kind: str) -> float:
        return of[f"{optimizer}/{kind}"] - of[f"{optimizer}/ordinary"]

    rows = []
    reference = {kind: refresh(best, "optax.contrib.galore", kind) for kind in ("warm", "cold")}
    for optimizer in optimizers:
        ordinary = best[f"{optimizer}/ordinary"]
        warm, cold = (refresh(best, optimizer, kind) for kind in ("warm", "cold"))
        rows.append(
            {
                "block": name,
                "rank": size.rank,
                "optimizer": optimizer,
                "warm refresh, times faster": reference["warm"] / warm,
                "cold refresh, times faster": reference["cold"] / cold,
                "step / optax": ordinary / best["optax.contrib.galore/ordinary"],
                "step / two products": ordinary / best["two products"],
                "mean step at gap 200 / step": 1 + warm / 200 / ordinary,
                "step": ordinary,
                "warm refresh": warm,
                "cold refresh": cold,
                "step, median": median[f"{optimizer}/ordinary"],
                "warm refresh, median": refresh(median, optimizer, "warm"),
                "cold refresh, median": refresh(median, optimizer, "cold"),
            }
        )
    return rows, left_out


def _optimizers(size: BlockSize) -> dict[str, dict[str, Step]]:
    def ours(**options: Any) -> optax.GradientTransformation:
        return gj.galore(1e-2, size.rank, NEVER, **options)

    exact = {"projector": gj.projectors.gram_eigh(), "transport": gj.transport.keep()}
    return {
        "galore_jax": _jax_steps(size, ours(), _make_due),
        "galore_jax side=long": _jax_steps(size, ours(side="long"), _make_due),
        "galore_jax gram_eigh+keep": _jax_steps(size, ours(**exact), _make_due),
        "optax.contrib.galore": _jax_steps(
            size, optax.contrib.galore(1e-2, size.rank, NEVER), _rewind
        ),
    }


def _make_due(state: Any, cold: bool) -> Any:
    """Our state with every basis due, as if for the first time or not."""
    lens: gj.LowRankState = state[0]
    refresh = lens.refresh_state._replace(
        due=jax.tree.map(lambda due: jnp.ones_like(due), lens.refresh_state.due),
        refreshes=jax.tree.map(lambda n: jnp.full_like(n, not cold), lens.refresh_state.refreshes),
    )
    return (lens._replace(refresh_state=refresh), *state[1:])


def _rewind(state: Any, cold: bool) -> Any:
    """optax's state at count 0, where its refresh happens; it has no warm start."""
    del cold
    return (state[0]._replace(count=jnp.zeros_like(state[0].count)), *state[1:])


def _jax_steps(
    size: BlockSize, tx: optax.GradientTransformation, make_due: Callable[[Any, bool], Any]
) -> dict[str, Step]:
    gradients, params = random_block(size, 0), random_block(size, 1)
    update = jax.jit(tx.update, donate_argnums=1)
    _, state = update(gradients, tx.init(params), params)
    # Donated and taken back, as in a training loop; each kind of step has its own copy.
    states = {kind: jax.tree.map(jnp.copy, state) for kind in ("ordinary", "warm", "cold")}

    def step(kind: str) -> Any:
        before = states[kind]
        if kind != "ordinary":
            before = jax.block_until_ready(make_due(before, kind == "cold"))
        updates, states[kind] = update(gradients, before, params)
        return updates, states[kind]

    return {kind: functools.partial(step, kind) for kind in states}


def _products(size: BlockSize) -> Step:
    """G·P and N·Pᵀ of every matrix, on the shorter side, and nothing else."""
    gradients = random_block(size, 0)
    bases = {
        name: jnp.linalg.qr(random_block(size, 2)[name][: min(shape), : size.rank])[0]
        for name, shape in size.shapes.items()
    }

    @jax.jit
    def products(gradients: Any, bases: Any) -> Any:
        def both(gradient: jax.Array, basis: jax.Array) -> jax.Array:
            if gradient.shape[0] <= gradient.shape[1]:
                return basis @ (basis.T @ gradient)
            return (gradient @ basis) @ basis.T

        return jax.tree.map(both, gradients, bases)

    return lambda: products(gradients, bases)


if __name__ == "__main__":
    main()
