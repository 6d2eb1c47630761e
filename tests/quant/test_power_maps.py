"""Power maps against an oracle in fp64: a root of each entry, rounded to a uniform grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax.quant import power

encode = jax.jit(power.encode, static_argnames=("signed", "block", "axis"))
decode = jax.jit(power.decode)

both_maps = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
BLOCK = 16
# Rounding errors of a position.
SLIP = 1e-3


def top_code(signed):
    return 127 if signed else 255


def rooted(x, signed):
    return np.sign(x) * np.abs(x) ** (0.5 if signed else 0.25)


def codes_of(q):
    return np.moveaxis(np.asarray(q.codes, int), q.axis, -1)


def values(signed, *shape):
    """Blocks of the moments' many decades, with plain ones among them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * 10.0 ** rng.uniform(-8, 1, shape)
    x[..., ::3] = rng.normal(size=x[..., ::3].shape)
    x[..., ::7] = 0
    return (x if signed else x**2).astype(np.float32)


def greatest(x):
    """Per entry the greatest magnitude of its block along the last axis."""
    scale = np.zeros_like(x)
    for start in range(0, x.shape[-1], BLOCK):
        part = np.s_[..., start : start + BLOCK]
        scale[part] = np.max(np.abs(x[part]), -1, keepdims=True)
    return scale


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("shape", "axis"), [((40, 77), -1), ((3, 50, 5), -2), ((101,), -1), ((5, 1), -1), ((3, 16), -1)]
)
@both_maps
def test_agrees_with_an_oracle(signed, shape, axis):
    x = values(signed, *shape)
    q = encode(x, signed=signed, block=BLOCK, axis=axis)
    blocks = list(shape)
    blocks[axis] = -(-shape[axis] // BLOCK)
    assert q.shape == shape and q.ndim == len(shape)
    assert q.codes.dtype == jnp.uint8 and q.scales.dtype == jnp.float32
    assert q.codes.shape == shape and q.scales.shape == tuple(blocks)

    x = np.moveaxis(x, axis, -1).astype(np.float64)
    decoded = np.moveaxis(np.asarray(decode(q)), axis, -1).astype(np.float64)
    scale, top, codes = greatest(x), top_code(signed), codes_of(q)
    np.testing.assert_array_equal(
        np.repeat(np.moveaxis(np.asarray(q.scales), axis, -1), BLOCK, -1)[..., : shape[axis]], scale
    )
    position = rooted(x / np.where(scale == 0, 1, scale), signed) * top
    code = np.round(position)
    if not signed:
        # A positive entry never becomes zero: others are divided by its root.
        code = np.maximum(code, x > 0)
        assert np.all(codes[x > 0] > 0) and np.all(decoded[x > 0] > 0)
    sure = np.abs(position - np.floor(position) - 0.5) > SLIP
    assert np.mean(sure) > 0.9
    np.testing.assert_array_equal((codes - top * signed)[sure], code[sure])
    assert np.all(np.abs(codes - top * signed - code) <= 1)
    part = (codes - top * signed) / top
    expected = np.sign(part) * np.abs(part) ** (2 if signed else 4) * scale
    np.testing.assert_allclose(decoded, expected, rtol=1e-6)
    assert np.all(decoded[x == 0] == 0) and np.all(decoded * x >= 0)
    # Exact where it is greatest, with its sign.
    np.testing.assert_array_equal(decoded[np.abs(x) == scale], x[np.abs(x) == scale])


@both_maps
def test_every_code_is_kept_by_encoding_again(signed):
    """At awkward scales, and in a block with the greatest one."""
    top = top_code(signed)
    part = np.arange(-top if signed else 0, top + 1) / top
    part = np.sign(part) * np.abs(part) ** (2 if signed else 4)
    scales = np.asarray([1, 3e-20, 7.7e12, 1.1e-7, 1e37, 0.3, 5e9], np.float32)
    q = encode((part * scales[:, None]).astype(np.float32), signed=signed, block=256)
    np.testing.assert_array_equal(q.scales[:, 0], scales)
    codes = codes_of(q)
    np.testing.assert_array_equal(codes, np.tile(np.arange(codes.shape[1]), (len(scales), 1)))
    assert_same_bits(encode(decode(q), signed=signed, block=256), q)


@both_maps
def test_idempotent(signed):
    q = encode(values(signed, 40, 77), signed=signed, block=BLOCK)
    assert_same_bits(encode(decode(q), signed=signed, block=BLOCK), q)


@both_maps
def test_special_blocks(signed):
    """Zero, constant, tiny, huge and not finite: each to itself."""
    normal = np.abs(np.random.default_rng(2).normal(size=(40, 77)))

    def rounded(x):
        q = encode(x.astype(np.float32), signed=signed, block=BLOCK)
        return np.asarray(decode(q))

    clean = rounded(normal)
    x = normal.copy()
    x[0] = 0
    x[1] = 0.3
    x[2] *= 1e-30
    x[3] *= 1e-41
    x[4] = np.minimum(1e37 * normal[4], 8e37)
    x[5, 0], x[6, 20], x[7, 76] = np.nan, np.inf, -np.inf if signed else np.nan
    x[8] = -0.0
    decoded = rounded(x)
    np.testing.assert_array_equal(decoded[0], 0)
    np.testing.assert_array_equal(decoded[1], np.float32(0.3))
    np.testing.assert_allclose(decoded[2], clean[2] * 1e-30, rtol=1e-5, atol=2.0**-126)
    assert np.max(np.abs(decoded[3])) <= 2.0**-126
    assert np.all(np.isfinite(decoded[4])) and np.max(decoded[4]) == np.float32(np.max(x[4]))
    np.testing.assert_allclose(decoded[4], x[4], rtol=0.5, atol=1e36)
    dirty = np.zeros(x.shape, bool)
    dirty[5, :16] = dirty[6, 16:32] = dirty[7, 64:] = True
    np.testing.assert_array_equal(np.isnan(decoded), dirty)
    np.testing.assert_array_equal(decoded[5:8][~dirty[5:8]], clean[5:8][~dirty[5:8]])
    np.testing.assert_array_equal(decoded[8], 0)
    np.testing.assert_array_equal(decoded[9:], clean[9:])


@both_maps
def test_the_largest_numbers(signed):
    """The inverse of a number beyond 2^126 is not a normal number."""
    x = np.zeros((40, 77), np.float32)
    x[:, :4] = [3e38, 1e38, -2e38 if signed else 2e38, 9e37]
    decoded = decode(encode(x, signed=signed, block=BLOCK))
    np.testing.assert_allclose(decoded, x, rtol=0.03)


@both_maps
def test_leading_axes_lead(signed):
    x = values(signed, 3, 10, 21)
    q = encode(x, signed=signed, block=8)
    sliced = jax.tree.map(lambda part: part[1], q)
    assert_same_bits(sliced, encode(x[1], signed=signed, block=8))
    assert sliced.shape == (10, 21)
    np.testing.assert_array_equal(decode(sliced), decode(q)[1])
    np.testing.assert_array_equal(jax.vmap(decode)(q), decode(q))


def test_blocks_along_the_axis_before_the_last():
    x = values(True, 3, 50, 5)
    columns = encode(x, signed=True, block=BLOCK, axis=-2)
    rows = encode(np.swapaxes(x, -1, -2).copy(), signed=True, block=BLOCK)
    for part in ("codes", "scales"):
        np.testing.assert_array_equal(
            np.swapaxes(getattr(columns, part), -1, -2), getattr(rows, part)
        )
    np.testing.assert_array_equal(np.swapaxes(decode(columns), -1, -2), decode(rows))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_decodes_to_its_dtype(dtype):
    x = jnp.asarray(values(True, 40, 77), dtype)
    q = encode(x, signed=True, block=BLOCK)
    assert q.dtype == dtype and decode(q).dtype == dtype and q.scales.dtype == jnp.float32
    assert_same_bits(jax.jit(power.encode_like)(x, q), q)
    wide = encode(x.astype(jnp.float32), signed=True, block=BLOCK)
    np.testing.assert_array_equal(decode(q), decode(wide).astype(dtype))


@both_maps
def test_monotone(signed):
    """Greater numbers never get smaller values."""
    x = np.linspace(-1 if signed else 0, 1, 3080).reshape(40, 77) ** 5
    ends = np.ones((40, 1))
    q = encode(np.append(ends, x, 1).astype(np.float32), signed=signed, block=128)
    assert np.all(np.diff(np.asarray(decode(q))[:, 1:].ravel()) >= 0)


@both_maps
def test_relative_precision(signed):
    """Nearly the same over the decades that the codes are meant for."""
    x = np.tile(np.geomspace(1e-2, 1, 77, dtype=np.float32), (40, 1))
    error = np.abs(decode(encode(x, signed=signed, block=128)) / x - 1)
    exponent, top = (2 if signed else 4), top_code(signed)
    # Half a step of the root at the least entry.
    assert np.max(error) <= (1 + 0.5 / top / 0.01 ** (1 / exponent)) ** exponent - 1 + 1e-5
