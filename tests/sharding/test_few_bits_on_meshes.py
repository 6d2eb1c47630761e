"""Codes on a mesh: INT8 weights, INT4 bases and 8-bit moments."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_cases import SHAPES, SPECS, distance, draw, mesh_of, on_mesh, train

import galore_jax as gj

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction

LENS = {"rank": 8, "axes": gj.MatrixAxes()}
IN_FEW_BITS = optax.chain(
    gj.low_rank_projection(
        gj.quantized_state(optax.scale_by_adam(), min_size=64, block=16),
        **LENS,
        refresh=5,
        codec=gj.codecs.int4(block=16),
    ),
    optax.scale(-0.01),
)


@pytest.fixture(scope="module")
def alone():
    with jax.numpy_dtype_promotion("standard"):
        return train(IN_FEW_BITS, SHAPES, steps=12)[0]


@pytest.mark.parametrize(
    "mesh, specs, kind",
    [
        ("8x1", "fsdp", AxisType.Auto),
        ("4x2", "both", AxisType.Auto),
        ("2x2x2", "other", AxisType.Explicit),
    ],
)
@pytest.mark.sampled(1)
def test_int4_bases_and_8_bit_moments(alone, mesh, specs, kind):
    """Not bit for bit: where sums are taken in another order, now and then a code tips."""
    sharding = on_mesh(mesh_of(mesh, kind), SPECS[mesh][specs])
    way, _ = train(IN_FEW_BITS, SHAPES, sharding, steps=12)
    error, leaf = distance(way, alone)
    assert error < 1e-3, leaf


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.sampled(1)
def test_int8_weights_on_a_mesh(kind):
    sharding = on_mesh(mesh_of("4x2", kind), SPECS["4x2"]["both"])
    tx = gj.q_galore_adamw8bit(1e-2, **LENS)
    weights = gj.quant.quantize_params(draw(0, SHAPES))
    state = gj.init_sharded(tx, weights, sharding)
    gradients = jax.device_put(draw(1, SHAPES), sharding)
    updates, _ = jax.jit(tx.update)(gradients, state)
    expected, _ = jax.jit(tx.update)(draw(1, SHAPES), tx.init(draw(0, SHAPES)))
    for name in SHAPES:
        np.testing.assert_allclose(jax.device_get(updates[name]), expected[name], atol=1e-4)


@pytest.mark.parametrize("spec", [P("data", None), P(None, "data")], ids=str)
@pytest.mark.sampled(1)
def test_int8_weights_are_used_and_written_on_an_explicit_mesh(spec):
    mesh = jax.make_mesh((8,), ("data",))
    weight = draw(0, SHAPES)["wide"]
    on_one_device = gj.quant.quantize(weight, block=32)
    parts = NamedSharding(mesh, spec)
    stored = jax.tree.map(
        lambda x: jax.device_put(x, parts if x.shape == weight.shape else NamedSharding(mesh, P())),
        on_one_device,
    )
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(
            jax.device_get(gj.quant.dequantize(stored)), gj.quant.dequantize(on_one_device)
        )
        update = jax.device_put(0.1 * weight, parts)
        new = gj.apply_updates({"w": stored}, {"w": update}, key=None)["w"]
    assert new.codes.sharding.spec == stored.codes.sharding.spec
    expected = gj.apply_updates({"w": on_one_device}, {"w": 0.1 * weight}, key=None)["w"]
    assert np.max(np.abs(jax.device_get(new.codes).astype(int) - expected.codes)) <= 1
