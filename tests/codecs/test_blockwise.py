"""Codecs that keep a few bits per entry, and the laws of every codec."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj
from galore_jax import codecs
from galore_jax.quant import QuantizedArray

CODECS = [
    codecs.identity(),
    codecs.cast("bfloat16"),
    codecs.int8(),
    codecs.int8(block=5),
    codecs.int4(),
    codecs.int4(block=5),
]
KEY = np.zeros(2, np.uint32)  # none of these stores it
every_codec = pytest.mark.parametrize("codec", CODECS, ids=repr)

encode = jax.jit(lambda codec, array: codec.encode(array, KEY), static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def decode(codec, stored, dtype, shape=None):
    shape = jax.tree.leaves(stored)[0].shape if shape is None else shape
    return codec.decode(stored, dtype, shape)


def basis(*batch, size=13, rank=4):
    rng = np.random.default_rng(0)
    return jnp.asarray(np.linalg.qr(rng.normal(size=(*batch, size, rank)))[0], jnp.float32)


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@every_codec
@pytest.mark.parametrize(
    "array",
    [
        basis(6),
        # The first coordinate vectors, which a state starts from; and what has few digits.
        jnp.broadcast_to(jnp.eye(13, 4), (6, 13, 4)),
        jnp.round(basis(6) * 8) / 8,
        jnp.concatenate([basis(6)[:, :6], -basis(6)[:, :7]], 1),
        jnp.zeros((6, 13, 4)),
    ],
    ids=["basis", "eye", "coarse", "symmetric", "zero"],
)
def test_encoding_what_was_decoded_changes_no_bit(codec, array):
    stored = encode(codec, array)
    assert_same_bits(encode(codec, decode(codec, stored, jnp.float32)), stored)


@every_codec
def test_batch_axes_lead_and_nothing_is_empty(codec):
    whole = basis(2, 3)
    stored = encode(codec, whole)
    for part in jax.tree.leaves(stored):
        assert part.shape[:2] == (2, 3) and part.size > 0
    assert_same_bits(jax.tree.map(lambda part: part[1], stored), encode(codec, whole[1]))
    one = jax.tree.map(lambda part: part[1, 2], stored)
    assert_same_bits(one, encode(codec, whole[1, 2]))
    np.testing.assert_array_equal(
        decode(codec, one, jnp.float32), decode(codec, stored, jnp.float32)[1, 2]
    )


@every_codec
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_decodes_to_the_dtype_asked_for(codec, dtype):
    with jax.enable_x64(dtype == "float64"):
        array = basis().astype("float64" if dtype == "float64" else "float32")
        stored = encode(codec, array)
        decoded = decode(codec, stored, dtype)
        assert decoded.dtype == dtype and decoded.shape == array.shape
        atol = 0.06 if isinstance(codec, codecs.int4) else 8e-3
        np.testing.assert_allclose(decoded.astype("float32"), array.astype("float32"), atol=atol)
        if dtype == "float64":
            assert_same_bits(encode(codec, decoded), stored)


@pytest.mark.parametrize(
    ("codec", "bytes_"),
    [(codecs.int8(), 1), (codecs.int4(), 0.5), (codecs.int4(block=32), 0.5)],
    ids=repr,
)
def test_bytes(codec, bytes_):
    stored = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct((512, 16), jnp.float32), KEY)
    assert stored.codes.dtype == jnp.uint8 and stored.codes.size == 512 * 16 * bytes_
    # The blocks run down the columns.
    assert stored.scales.shape == (512 // codec.block, 16)
    compiled = jax.jit(lambda s: codec.decode(s, jnp.float32, (512, 16))).lower(stored).compile()
    expected = 512 * 16 * (bytes_ + 5 / codec.block)
    assert abs(compiled.memory_analysis().argument_size_in_bytes - expected) <= 256


def test_blocks_run_down_the_columns():
    """A column of small entries beside one of large ones keeps its precision."""
    array = basis(size=64) * jnp.asarray([[1.0, 1e-3, 1e-6, 1e3]])
    for codec, tolerance in ((codecs.int8(), 0.01), (codecs.int4(), 0.2)):
        decoded = decode(codec, encode(codec, array), jnp.float32)
        error = jnp.max(jnp.abs(decoded - array), 0) / jnp.max(jnp.abs(array), 0)
        assert np.all(error < tolerance)


@pytest.mark.parametrize("codec", [codecs.int8, codecs.int4])
def test_construction(codec):
    assert codec() == codec(block=256) and hash(codec()) == hash(codec(256))
    assert codec(64) != codec(32)
    assert repr(codec(64)) == f"{codec.__name__}(block=64)"
    with pytest.raises(ValueError, match=r"`block`.*0"):
        codec(block=0)
    with pytest.raises(TypeError, match=r"`block`.*2\.5"):
        codec(block=2.5)


def test_codecs_are_different():
    assert codecs.int8() != codecs.int4()


# --- in the lens -------------------------------------------------------------------------------


SHAPES = {"w": (24, 16), "stack": (2, 10, 17), "bias": (16,)}


def trees(number):
    rng = np.random.default_rng(1)
    return [
        {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
        for _ in range(number)
    ]


@pytest.mark.standard_promotion
@pytest.mark.parametrize("codec", [codecs.int8(), codecs.int4(block=5)], ids=repr)
@pytest.mark.sampled(1)
def test_five_steps_of_adamw(codec):
    """Updates lie in the span of the decoded basis, which is what has been stored."""
    params, *gradients = trees(6)
    tx = gj.galore_adamw(
        1e-2, rank=3, update_proj_gap=2, scale=1.0, codec=codec, axes=gj.MatrixAxes()
    )
    state, update = tx.init(params), jax.jit(tx.update)
    start = state
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        assert jax.tree.structure(state) == jax.tree.structure(start)
        for name in ("w", "stack"):
            stored = state[0].projectors[name]
            assert isinstance(stored, QuantizedArray) and stored.bits == codec.bits
            span = np.asarray(decode(codec, stored, jnp.float32), np.float64)
            size = span.shape[-2]
            lifted = np.asarray(updates[name], np.float64)
            if lifted.shape[-1] != size:
                lifted = np.swapaxes(lifted, -1, -2)
            orthonormal = np.linalg.qr(span)[0]
            inside = lifted @ orthonormal @ np.swapaxes(orthonormal, -1, -2)
            assert np.max(np.abs(lifted)) > 1e-3
            np.testing.assert_allclose(inside, lifted, atol=1e-7)
            # Of a basis that is off by a little they would not.
            span[..., 0, :] += 0.02
            other = np.linalg.qr(span)[0]
            outside = lifted - lifted @ other @ np.swapaxes(other, -1, -2)
            assert np.max(np.abs(outside)) > 1e-5
        params = optax.apply_updates(params, updates)
    for name in SHAPES:
        assert np.all(np.isfinite(params[name]))


def test_projected_and_lifted_with_the_same_basis():
    """With plain SGD inside, the update is -G P Pᵀ, P what is stored."""
    gradient = {"w": trees(1)[0]["w"]}
    codec = codecs.int4(block=8)
    tx = gj.low_rank_projection(optax.identity(), 3, scale=1.0, codec=codec)
    updates, state = jax.jit(tx.update)(gradient, tx.init(gradient))
    p = np.asarray(decode(codec, state.projectors["w"], jnp.float32), np.float64)
    g = np.asarray(gradient["w"], np.float64)
    assert p.shape == (16, 3)
    np.testing.assert_allclose(updates["w"], g @ p @ p.T, atol=1e-5)
    assert np.max(np.abs(p.T @ p - np.eye(3))) > 1e-3


@pytest.mark.parametrize(
    ("made", "used"),
    [
        (codecs.int8(), codecs.int4()),
        (codecs.int4(), codecs.int8()),
        (codecs.int4(), codecs.int4(block=8)),
        (codecs.int4(), codecs.identity()),
        (codecs.identity(), codecs.int4()),
        (codecs.int8(), codecs.cast("bfloat16")),
    ],
    ids=repr,
)
def test_a_state_of_another_codec_is_refused(made, used):
    params, gradient = trees(2)
    state = jax.eval_shape(gj.galore_adamw(1e-2, rank=3, codec=made).init, params)
    other = gj.galore_adamw(1e-2, rank=3, codec=used)
    with pytest.raises(ValueError) as error:
        jax.eval_shape(other.update, gradient, state, params)
    assert repr(made) in str(error.value) and repr(used) in str(error.value)
    assert "codec" in str(error.value)
