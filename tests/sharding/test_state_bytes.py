"""Bytes of state on each device, of every optimizer, counted on arrays that exist."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_cases import SHAPES, SPECS, distance, draw, mesh_of, on_mesh, train

import galore_jax as gj

pytestmark = pytest.mark.standard_promotion

DEVICES, RANK, LONG, BLOCK = 8, 4, 2048, 256
AXES = gj.MatrixAxes()
MATRICES = {
    "embed": (LONG, 48),
    "up": (48, LONG),
    "layers": {"down": (3, LONG, 48), "scale": (3, LONG)},
}
ALONG_THE_LONG_AXIS = {
    "embed": P("data"),
    "up": P(None, "data"),
    "layers": {"down": P(None, "data"), "scale": P(None, "data")},
}
ALONG_THE_SHORT_AXIS = {
    "embed": P(None, "data"),
    "up": P("data"),
    "layers": {"down": P(None, None, "data"), "scale": P()},
}
ALIASES = {
    "galore": gj.galore(1e-2, RANK, axes=AXES),
    "galore_sgd": gj.galore_sgd(1e-2, RANK, axes=AXES, momentum=0.9),
    "galore_lion": gj.galore_lion(1e-3, RANK, axes=AXES),
    "galore_adamw": gj.galore_adamw(1e-2, RANK, axes=AXES, weight_decay=0.1),
    "galore_adamw8bit": gj.galore_adamw8bit(1e-2, RANK, axes=AXES),
    "galore_adafactor": gj.galore_adafactor(1e-2, RANK, axes=AXES),
    "q_galore_adamw8bit": gj.q_galore_adamw8bit(1e-2, RANK, axes=AXES),
}


def on_each_device(state):
    held = np.zeros(DEVICES, int)
    for array in jax.tree.leaves(state):
        for shard in array.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    return held


def sharded_state(tx, specs, **options):
    sharding = on_mesh(mesh_of("8x1"), specs)
    params = jax.device_put(draw(0, MATRICES), sharding)
    return gj.init_sharded(tx, params, sharding, **options)


def share(array, axis_sizes):
    """A part if it has an axis of one of these sizes, else all of it."""
    parts = DEVICES if set(array.shape) & set(axis_sizes) else 1
    return array.size * array.dtype.itemsize // parts


def test_every_alias_is_measured():
    named = {name for name in gj.__all__ if "galore" in name}
    assert set(ALIASES) == named


@pytest.mark.parametrize("alias", ALIASES)
def test_whatever_has_the_sharded_axis_is_divided(alias):
    """FSDP over the kept axis: replicated are bases, counts, and Adafactor's sums over that axis.

    The eight blocks of a long axis in few bits are divided like the axis itself.
    """
    state = sharded_state(ALIASES[alias], ALONG_THE_LONG_AXIS)
    rule = sum(share(array, (LONG, LONG // BLOCK)) for array in jax.tree.leaves(state))
    assert on_each_device(state).tolist() == [rule] * DEVICES
    everything = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    bases = gj.memory.report(state, draw(0, MATRICES)).projectors
    # Per device an eighth, the bases, and hardly anything else.
    small = 0.005 * everything
    assert rule <= (everything - bases) / DEVICES + bases + small


@pytest.mark.parametrize("alias", ["galore_adamw", "galore_lion", "q_galore_adamw8bit"])
def test_moments_are_replicated_over_the_mesh_axis_of_the_projected_axis_unless_spread(alias):
    def bytes_of(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    state = sharded_state(ALIASES[alias], ALONG_THE_SHORT_AXIS)
    spread = sharded_state(ALIASES[alias], ALONG_THE_SHORT_AXIS, spread=True)
    moments = [*jax.tree.leaves(state[0].inner_state)]
    low_rank = bytes_of([x for x in moments if RANK in x.shape and LONG in x.shape])
    assert low_rank > 0.1 * bytes_of(state)
    saved = on_each_device(state)[0] - on_each_device(spread)[0]
    assert saved >= low_rank * (1 - 1 / DEVICES)
    mu = spread[0].inner_state.mu["up"]
    mu = mu.codes if isinstance(mu, gj.quant.PowerArray) else mu
    assert mu.sharding.shard_shape(mu.shape) == (LONG // DEVICES, RANK)


ADAM = optax.chain(
    gj.low_rank_projection(optax.scale_by_adam(), 8, refresh=3, axes=AXES), optax.scale(-0.01)
)
SHARDING = on_mesh(mesh_of("4x2"), SPECS["4x2"]["both"])


@pytest.fixture(scope="module")
def alone():
    with jax.numpy_dtype_promotion("standard"):
        return train(ADAM, SHAPES, steps=7)[0]


def test_spread_moments_give_the_same_numbers_and_stay_spread(alone):
    way, state = train(ADAM, SHAPES, SHARDING, steps=7, spread=True)
    assert distance(way, alone)[0] < 1e-5
    promised = gj.state_sharding(ADAM, draw(0, SHAPES), SHARDING, spread=True)
    for array, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(promised), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    assert tuple(state[0].inner_state.mu["tall"].sharding.spec) == (("data", "model"), None)


def laid_out_like(tree, shardings):
    return all(
        array.sharding.is_equivalent_to(sharding, array.ndim)
        for array, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.sampled(1)
def test_what_is_pinned_keeps_its_layout_in_one_program(pinned):
    """What is not pinned has the same numbers, but the compiler lays updates out like moments."""
    params = jax.device_put(draw(0, SHAPES), SHARDING)
    states = gj.state_sharding(ADAM, params, SHARDING, spread=True)
    options = {"out_shardings": (SHARDING, states)} if pinned else {}
    update = jax.jit(lambda updates, state: ADAM.update(updates, state), **options)
    state = gj.init_sharded(ADAM, params, SHARDING, spread=True)
    expected_update = jax.jit(lambda updates, state: ADAM.update(updates, state))
    expected_state = ADAM.init(draw(0, SHAPES))
    for step in range(3):
        gradients = draw(step, SHAPES)
        updates, state = update(jax.device_put(gradients, SHARDING), state)
        expected, expected_state = expected_update(gradients, expected_state)
        assert distance(jax.device_get(updates), jax.device_get(expected))[0] < 1e-4
        assert laid_out_like(updates, SHARDING) == pinned
    assert (update._cache_size() == 1) == pinned
    assert not pinned or laid_out_like(state, states)


def test_a_state_that_is_only_jitted_is_on_one_device():
    """Why `init_sharded` is there: zeros depend on no argument that could tell them where to be."""
    params = jax.device_put(draw(0, SHAPES), SHARDING)
    state = jax.jit(ADAM.init)(params)
    assert len(state[0].inner_state.mu["tall"].sharding.device_set) == 1
    assert isinstance(
        gj.init_sharded(ADAM, params, SHARDING)[0].inner_state.mu["tall"].sharding, NamedSharding
    )
