"""A `QuantizedArray` is a pytree that stands for one array; `add` writes it in place of one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import galore_jax as gj
from galore_jax.quant import QuantizedArray
from galore_jax.quant.array import add

BITS = [8, 4]
# One program each, instead of one per operation.
quantize = jax.jit(gj.quant.quantize, static_argnames=("bits", "block", "axis"))
dequantize = jax.jit(gj.quant.dequantize)
decode = jax.jit(gj.quant.array.decode)
jit_add = jax.jit(add)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


@functools.cache
def stack(bits, axis=-1):
    return quantize(normal(6, 10, 21), bits=bits, block=8, axis=axis)


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


both_widths = pytest.mark.parametrize("bits", BITS)
every_form = pytest.mark.parametrize(("bits", "axis"), [(8, -1), (4, -1), (4, -2)])


@every_form
def test_pytree(bits, axis):
    q = stack(bits, axis)
    parts, treedef = jax.tree.flatten(q)
    assert [part.dtype for part in parts] == [jnp.uint8, jnp.float32, jnp.uint8]
    assert_same_bits(jax.tree.unflatten(treedef, parts), q)
    assert q.shape == (6, 10, 21) and q.ndim == 3 and q.dtype == jnp.float32
    assert q.nbytes == sum(part.nbytes for part in parts)
    assert dequantize(q).shape == q.shape
    assert gj.quant.dequantize(parts[1]) is parts[1]


@every_form
def test_a_slice_of_the_parts_is_the_slice(bits, axis):
    q = stack(bits, axis)
    sliced = jax.tree.map(lambda part: part[2:5], q)
    assert_same_bits(sliced, quantize(normal(6, 10, 21)[2:5], bits=bits, block=8, axis=axis))
    np.testing.assert_array_equal(dequantize(sliced), dequantize(q)[2:5])
    one = jax.tree.map(lambda part: part[1], q)
    assert one.shape == (10, 21)
    np.testing.assert_array_equal(dequantize(one), dequantize(q)[1])


@every_form
def test_mapped_and_scanned(bits, axis):
    q = stack(bits, axis)
    mapped = jax.vmap(lambda x: quantize(x, bits=bits, block=8, axis=axis))(normal(6, 10, 21))
    assert_same_bits(mapped, q)

    def body(carry, layer):
        assert layer.shape == (10, 21) and layer.ndim == 2
        return carry + 1, dequantize(layer)

    _, scanned = jax.lax.scan(body, 0, q)
    np.testing.assert_array_equal(scanned, dequantize(q))
    np.testing.assert_array_equal(jax.vmap(dequantize)(q), dequantize(q))


@both_widths
def test_abstract(bits):
    q = jax.eval_shape(
        functools.partial(gj.quant.quantize, bits=bits), jnp.zeros((3, 700), jnp.bfloat16)
    )
    assert isinstance(q, QuantizedArray)
    assert q.shape == (3, 700) and q.dtype == jnp.bfloat16 and q.ndim == 2
    assert q.codes.shape == (3, 700 * bits // 8) and q.scales.shape == (3, 3)
    assert q.nbytes == 3 * (700 * bits // 8 + 3 * 5)
    assert jax.eval_shape(dequantize, q) == jax.ShapeDtypeStruct((3, 700), jnp.bfloat16)
    assert repr(q) == f"QuantizedArray(shape=(3, 700), bits={bits}, block=256, dtype=bfloat16)"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_arithmetic(dtype):
    """What weight decay does with a parameter."""
    q = quantize(normal(4, 10, dtype=dtype), block=8)
    w = dequantize(q)
    g = normal(4, 10, dtype=dtype)
    two = jnp.asarray(2, dtype)
    for product, expected in [
        (0.1 * q, 0.1 * w),
        (q * 0.1, w * 0.1),
        (two * q, two * w),
        (q * two, w * two),
        (g * q, g * w),
        (np.asarray(g) * q, g * w),
        (g + 0.1 * q, g + 0.1 * w),
        (g + q, g + w),
        (jnp.abs(q), jnp.abs(w)),
    ]:
        assert product.dtype == dtype
        np.testing.assert_array_equal(product, expected)
    assert q.astype(jnp.float16).dtype == jnp.float16
    np.testing.assert_array_equal(q.astype(jnp.float32), decode(q))
    np.testing.assert_array_equal(jax.jit(lambda q, g: g + 0.1 * q)(q, g), g + 0.1 * w)


@pytest.mark.parametrize(
    ("error", "x", "options", "pattern"),
    [
        (TypeError, jnp.ones((2, 4), jnp.int32), {}, "floating.*int32"),
        (TypeError, jnp.ones((2, 4), jnp.complex64), {}, "floating.*complex64"),
        (TypeError, jnp.ones((2, 4), bool), {}, "floating.*bool"),
        (ValueError, jnp.ones((2, 4)), {"bits": 2}, "`bits` is 8 or 4, got 2"),
        (ValueError, jnp.ones((2, 4)), {"bits": None}, "`bits`.*None"),
        (ValueError, jnp.ones((2, 4)), {"block": 0}, "`block`.*0"),
        (ValueError, jnp.ones((2, 4)), {"block": -3}, "`block`.*-3"),
        (TypeError, jnp.ones((2, 4)), {"block": 2.5}, "`block`.*2.5"),
        (TypeError, jnp.ones((2, 4)), {"block": True}, "`block`.*True"),
        (ValueError, jnp.ones((2, 4)), {"axis": 0}, "axis"),
        (ValueError, jnp.float32(1.0), {}, r"\(\).*axis -1"),
        (ValueError, jnp.ones(4), {"axis": -2}, r"\(4,\).*axis -2"),
        (ValueError, jnp.ones((3, 0)), {}, r"\(3, 0\)"),
    ],
)
def test_errors(error, x, options, pattern):
    with pytest.raises(error, match=pattern):
        gj.quant.quantize(x, **options)


@pytest.mark.parametrize(("bits", "size"), [(8, 1.0), (4, 0.5)])
def test_bytes_that_xla_allocates(bits, size):
    q = jax.eval_shape(functools.partial(gj.quant.quantize, bits=bits), jnp.zeros((64, 1024)))
    compiled = jax.jit(lambda q: jnp.sum(dequantize(q))).lower(q).compile()
    entries = 64 * 1024
    bytes_ = compiled.memory_analysis().argument_size_in_bytes
    # Per block of 256 a scale and a zero point; arguments are aligned.
    assert entries * size <= bytes_ <= entries * (size + 5 / 256) + 256


@both_widths
def test_sharded(bits):
    """One spec for every part: over leading axes, and over the block axis at a block's border."""
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("x",))
    q = stack(bits)
    sharded = jax.device_put(q, NamedSharding(mesh, PartitionSpec("x")))
    for part in jax.tree.leaves(sharded):
        assert part.addressable_shards[0].data.shape[0] == 3
    np.testing.assert_array_equal(jax.jit(dequantize)(sharded), dequantize(q))

    x = normal(4, 64)
    q = quantize(x, bits=bits, block=16)
    sharded = jax.device_put(q, NamedSharding(mesh, PartitionSpec(None, "x")))
    np.testing.assert_array_equal(jax.jit(dequantize)(sharded), dequantize(q))
    shard = jax.tree.map(lambda part: part.addressable_shards[1].data, sharded)
    half = quantize(x[:, 32:], bits=bits, block=16)
    for one, other in zip(jax.tree.leaves(shard), jax.tree.leaves(half), strict=True):
        np.testing.assert_array_equal(one, other)


# --- add ---------------------------------------------------------------------------------------


def noise(seed, shape):
    return jax.random.uniform(jax.random.key(seed), shape)


def many(row):
    """Blocks that are alike."""
    return jnp.tile(jnp.asarray([row], jnp.float32), (64, 1))


def rounded_to(q, seed):
    return None if seed is None else noise(seed, q.shape)


@functools.cache
def stored(bits, stochastic=False, axis=-1):
    """Blocks of both signs, of one, constant, zero and short ones."""
    rows = [
        normal(21),
        1 + jnp.abs(normal(21)),
        -2 - jnp.abs(normal(21)),
        jnp.full(21, 0.7),
        jnp.zeros(21),
        1e-30 * normal(21),
        3e-37 * normal(21),
    ]
    x = jnp.stack(rows)
    key = jax.random.key(3) if stochastic else None
    return quantize(x if axis == -1 else x.T, bits=bits, block=8, key=key, axis=axis)


@every_form
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("seed", [None, 0])
def test_adding_zero_changes_no_bit(bits, axis, stochastic, seed):
    q = stored(bits, stochastic, axis)
    assert_same_bits(jit_add(q, jnp.zeros(q.shape), rounded_to(q, seed)), q)


@both_widths
@pytest.mark.parametrize("seed", [None, 0])
def test_adding_zero_to_a_block_that_has_shrunk(bits, seed):
    """What was just wide enough for its grid before rounding may be too narrow after it."""
    top = 2**bits - 1
    inner = np.round(np.asarray([0.2, 0.15, 0.1, -0.05, -0.1, -0.02]) * top)
    low = np.floor(top / 3)
    q = quantize(many([-low, top - low, *inner]), bits=bits, block=8)
    np.testing.assert_array_equal(q.scales, 1)
    update = np.zeros(q.shape, np.float32)
    rng = np.random.default_rng(0)
    update[:, 0] = top / 8 + rng.uniform(size=64)
    update[:, 1] = -3 * top / 8 + rng.uniform(-2, 2, size=64) - update[:, 0] % 1
    q = jit_add(q, jnp.asarray(update), rounded_to(q, seed))
    for again in (None, 1):
        assert_same_bits(jit_add(q, jnp.zeros(q.shape), rounded_to(q, again)), q)


@both_widths
@pytest.mark.parametrize("seed", [None, 0])
def test_a_random_walk(bits, seed):
    """Every sum is within a code of the exact one, and zero never moves anything."""
    q = stored(bits)
    rng = np.random.default_rng(1)
    slack = (0.5 if seed is None else 1.0) + 1e-3
    for step in range(20):
        size = 10.0 ** rng.uniform(-4, 1) if step % 4 else 0.0
        update = jnp.asarray(size * rng.normal(size=q.shape), jnp.float32)
        update = jnp.where(rng.uniform(size=q.shape) < 0.3, -decode(q), update) if size else update
        new = jit_add(q, update, rounded_to(q, None if seed is None else step))
        if not size:
            assert_same_bits(new, q)
        exact = np.asarray(decode(q), np.float64) + np.asarray(update, np.float64)
        scale = np.repeat(np.asarray(new.scales, np.float64), 8, -1)[:, :21]
        assert np.all(np.abs(np.asarray(decode(new)) - exact) <= slack * scale + 1e-6 * size)
        span = [np.ptp(np.append(row[i : i + 8], 0)) for row in exact for i in (0, 8, 16)]
        widths = np.asarray(new.scales, np.float64).ravel() * (2**bits - 1)
        # Never more than twice too wide.
        assert np.all(widths <= np.maximum(2.3 * np.asarray(span), 1e-35))
        q = new


@both_widths
@pytest.mark.parametrize("seed", [None, 0])
def test_the_grid_stays_where_the_sum_fits(bits, seed):
    q = quantize(many([-1.0, 1.0, 0.5, -0.25, 0, 0, 0, 0]), bits=bits, block=8)
    step = float(q.scales[0, 0])
    inside = many([0.2, -0.2, -0.5, 0.25, 0.3, -0.3, 0.1, 0])
    new = jit_add(q, inside, rounded_to(q, seed))
    np.testing.assert_array_equal(new.scales, q.scales)
    np.testing.assert_array_equal(new.zeros, q.zeros)
    assert np.any(np.asarray(new.codes) != np.asarray(q.codes))
    np.testing.assert_allclose(decode(new), decode(q) + inside, atol=1.001 * step)


@both_widths
@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("size", [100.0, 1e-3, 1e-6])
def test_the_grid_is_fitted_again_where_it_does_not(bits, seed, size):
    """Beyond its ends, and to a part of it so small that the old grid has no digits there."""
    q = quantize(many([-1.0, 1.0, 0.5, -0.25, 1, 1, -1, 0.3]), bits=bits, block=8)
    goal = size * many([1.0, -0.6, 0.0, 0.2, 0.3, 0.4, 0, -0.6])
    update = (goal - decode(q)).at[1:].set(0)
    new = jit_add(q, update, rounded_to(q, seed))
    exact = np.asarray(decode(q), np.float64)[0] + np.asarray(update, np.float64)[0]
    step = np.ptp(exact) / (2**bits - 1 - (seed is not None))
    np.testing.assert_allclose(new.scales[0, 0], step, rtol=1e-5)
    atol = (0.501 if seed is None else 1.001) * step
    np.testing.assert_allclose(decode(new)[0], exact, atol=atol)
    # The other blocks are left alone.
    for part in ("codes", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(new, part)[1:], getattr(q, part)[1:])


@both_widths
def test_small_updates_are_unbiased(bits):
    """A z-test per entry; the noise is in proportion to the update."""
    number = 20_000
    x = jnp.asarray([[-1.0, 1.0, 0.5, -0.25, 0.1, 0.9, 0.0, -0.7]])
    q = quantize(x, bits=bits, block=8)
    step = float(q.scales[0, 0])
    share = np.asarray([[0.3, -0.02, 0.5, -0.25, 0.004, -0.9, 0.01, 0.75]], np.float32)
    draws = jax.jit(jax.vmap(lambda n: decode(add(q, jnp.asarray(share * step), n))))(
        noise(0, (number, *x.shape))
    )
    change = (np.asarray(draws, np.float64) - np.asarray(decode(q), np.float64)) / step
    deviation = np.sqrt(np.abs(share) * (1 - np.abs(share)) / number)
    assert np.all(np.abs(change.mean(0) - share) <= 5 * deviation + 2e-4)
    assert np.max(np.abs(change)) < 1.001
    moved = np.mean(np.abs(change) > 0.5, 0)
    assert np.all(np.abs(moved - np.abs(share)) <= 5 * deviation + 2e-4)
    # Rounded to nearest, they are lost.
    small = jnp.asarray(np.clip(share, -0.4, 0.4) * step)
    assert_same_bits(jit_add(q, small, None), q)


@both_widths
def test_padding_does_not_hold_the_grid_wide(bits):
    """Zero has the greatest code in a negative block, and padding has code 0."""
    top = 2**bits - 1
    x = jnp.asarray(np.r_[np.ones(8), -5.0, -4.0, -3.0], jnp.float32)[None]
    q = quantize(x, bits=bits, block=8)
    new = jit_add(q, -0.9 * decode(q), None)
    np.testing.assert_allclose(new.scales[0], [0.1 / top, 0.5 / top], rtol=0.02)


@both_widths
@pytest.mark.parametrize("seed", [None, 0])
def test_what_is_not_finite_takes_its_block_along(bits, seed):
    q = stored(bits)
    update = np.zeros(q.shape, np.float32)
    update[0, 3], update[1, 10], update[2, 20] = np.nan, np.inf, -np.inf
    new = jit_add(q, jnp.asarray(update), rounded_to(q, seed))
    dirty = np.zeros(q.shape, bool)
    dirty[0, :8] = dirty[1, 8:16] = dirty[2, 16:] = True
    np.testing.assert_array_equal(np.isnan(decode(new)), dirty)
    np.testing.assert_array_equal(np.asarray(decode(new))[~dirty], np.asarray(decode(q))[~dirty])
    # And it stays NaN.
    again = jit_add(new, jnp.zeros(q.shape), rounded_to(q, seed))
    np.testing.assert_array_equal(np.isnan(decode(again)), dirty)


def test_add_keeps_dtype_and_form():
    q = quantize(normal(3, 20, dtype=jnp.bfloat16), block=8, bits=4)
    new = jit_add(q, normal(3, 20, dtype=jnp.bfloat16), noise(0, (3, 20)))
    assert jax.tree.structure(new) == jax.tree.structure(q)
    for one, other in zip(jax.tree.leaves(new), jax.tree.leaves(q), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
