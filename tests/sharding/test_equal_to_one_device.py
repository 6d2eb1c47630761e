"""However a model is sharded, thirty steps and six refreshes lead where they do on one device."""

import functools

import jax
import optax
import pytest
from jax.sharding import AxisType
from mesh_cases import MESHES, SHAPES, SPECS, distance, draw, mesh_of, on_mesh, train

import galore_jax as gj

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction

STEPS = 30
LENS = {"rank": 8, "refresh": 5, "axes": gj.MatrixAxes()}
SIDES = ("short", "long")
INNER = {"sgd": optax.trace(0.9), "adam": optax.scale_by_adam()}
TOLERANCE = {"sgd": 1e-5, "adam": 1e-4}


def optimizer(inner):
    """Every leaf twice, projected on its short and on its long side, in one program."""
    sides = {side: gj.low_rank_projection(INNER[inner], **LENS, side=side) for side in SIDES}
    return optax.chain(optax.partition(sides, {side: side for side in SIDES}), optax.scale(-0.01))


EVERY_SHAPE = dict.fromkeys(SIDES, dict.fromkeys(SPECS["4x2"], SHAPES))


@functools.cache
def alone(inner):
    return train(optimizer(inner), EVERY_SHAPE, steps=STEPS)[0]


CASES = [
    *((mesh, inner, AxisType.Auto) for mesh in MESHES for inner in INNER),
    ("8x1", "adam", AxisType.Explicit),
    ("4x2", "sgd", AxisType.Explicit),
    ("2x2x2", "sgd", AxisType.Explicit),
]


@pytest.mark.parametrize("mesh, inner, kind", CASES)
@pytest.mark.sampled(2)
def test_equal_to_one_device(mesh, inner, kind):
    sharding = dict.fromkeys(SIDES, on_mesh(mesh_of(mesh, kind), SPECS[mesh]))
    way, state = train(optimizer(inner), EVERY_SHAPE, sharding, steps=STEPS)
    error, leaf = distance(way, alone(inner))
    assert error < TOLERANCE[inner], leaf
    lens = state[0].inner_states["short"].inner_state
    assert int(lens.refresh_state.refreshes["short.fsdp.tall"]) == STEPS // LENS["refresh"]
    for array, like in zip(
        jax.tree.leaves(state),
        jax.tree.leaves(gj.state_sharding(optimizer(inner), draw(0, EVERY_SHAPE), sharding)),
        strict=True,
    ):
        assert array.sharding.is_equivalent_to(like, array.ndim)
