"""Gradients that no basis can be found in: zero or NaN, once or for good."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj
from galore_jax import projectors

STEPS, GAP = 9, 3
FACTORIZED = []


@dataclasses.dataclass(frozen=True)
class Counting(projectors.svd):
    """A projector that says how often it is run."""

    def basis(self, gradient, rank, **options):
        jax.debug.callback(lambda: FACTORIZED.append(None))
        return super().basis(gradient, rank, **options)


BAD = {"zero": 0.0, "nan": jnp.nan, "inf": jnp.inf}
TREES = {
    "stack": ({"layers": (3, 12, 8)}, lambda tree: tree["layers"]),
    "separate": (
        {f"layers/{i}": (12, 8) for i in range(3)},
        lambda tree: jnp.stack([tree[f"layers/{i}"] for i in range(3)]),
    ),
}


def gradients(kind, first_usable):
    """The middle one of three matrices is bad before the step `first_usable`."""
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        whole = rng.normal(size=(3, 12, 8)).astype("f4")
        if step < first_usable:
            whole[1] = BAD[kind]
        yield whole


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("first_usable", [1, GAP + 1, STEPS])
@pytest.mark.parametrize("policy", [gj.refresh.every(GAP), gj.refresh.staggered(GAP)], ids=str)
def test_a_bad_matrix_costs_no_factorization_and_holds_up_nobody(tree, kind, first_usable, policy):
    shapes, together = TREES[tree]
    tx = gj.low_rank_projection(
        optax.trace(0.9), 3, projector=Counting(), refresh=policy, axes=gj.MatrixAxes()
    )
    state = tx.init({name: jnp.zeros(shape) for name, shape in shapes.items()})
    step, bases = jax.jit(tx.update), [together(state.projectors)]
    runs = []
    for whole in gradients(kind, first_usable):
        tree_of = {
            name: jnp.asarray(whole if tree == "stack" else whole[i])
            for i, name in enumerate(shapes)
        }
        FACTORIZED.clear()
        _, state = step(tree_of, state)
        jax.effects_barrier()
        runs.append(len(FACTORIZED))
        bases.append(together(state.projectors))

    def planned(matrix, count):
        place = matrix * GAP // 3 if isinstance(policy, gj.refresh.staggered) else 0
        return count == 0 or count % GAP == place

    for count in range(STEPS):
        due = [planned(matrix, count) for matrix in range(3)]
        due[1] = (due[1] or count == first_usable) and count >= first_usable
        moved = [bool(jnp.any(bases[count + 1][i] != bases[count][i])) for i in range(3)]
        assert moved == due, count
        assert runs[count] == sum(due), count
