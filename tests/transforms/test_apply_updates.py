"""Weights in few bits: what is added arrives, in expectation, and nothing else changes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj
from galore_jax import keys
from galore_jax.quant import array
from galore_jax.transforms.apply_updates import stochastic_bfloat16

KEY = jax.random.key(0)


@jax.jit
def apply(params, updates, key):
    return gj.apply_updates(params, updates, key=key)


def normal(seed, *shape, scale=1.0, dtype=jnp.float32):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def over_keys(param, update, count, seed=1):
    """``float64[count, ...]``: the decoded results under as many keys."""

    def apply(key):
        new = gj.apply_updates({"w": param}, {"w": update}, key=key)["w"]
        return gj.quant.dequantize(new).astype(jnp.float32)

    results = jax.jit(jax.vmap(apply))(jax.random.split(jax.random.key(seed), count))
    return np.asarray(results, np.float64)


def assert_unbiased(results, exact, step):
    """Every entry's mean, and the mean of all of them, in standard errors of rounding.

    The bound on a single z is for the greatest one of thousands.
    """
    count = len(results)
    error = np.mean(results, axis=0) - exact
    deviation = np.std(results, axis=0)
    assert np.max(deviation) <= 0.51 * np.max(step)
    # Entries next to the grid are hardly ever rounded away from it: too rare for a normal law.
    z = error / np.maximum(deviation / np.sqrt(count), 5 * step / count)
    assert np.max(np.abs(z)) < 5.5
    pooled = np.sum(error) / np.sqrt(np.sum(deviation**2) / count)
    assert abs(pooled) < 4


# Leaves that optax can write


@pytest.mark.parametrize("key", [None, KEY], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32"])
def test_other_leaves_are_what_optax_makes_of_them(dtype, key):
    with jax.enable_x64(dtype == "float64"):
        params = {"a": normal(0, 7, 5, scale=9.0).astype(dtype), "none": None, "n": jnp.asarray(3)}
        updates = {"a": normal(1, 7, 5, scale=9.0).astype(dtype), "none": None, "n": jnp.asarray(2)}
        assert params["a"].dtype == dtype
        ours = gj.apply_updates(params, updates, key=key)
        assert_same_bits(ours, optax.apply_updates(params, updates))


def test_an_update_of_another_dtype_as_in_optax():
    params, updates = {"w": normal(0, 6)}, {"w": normal(1, 6, dtype=jnp.bfloat16)}
    with jax.numpy_dtype_promotion("standard"):
        ours = gj.apply_updates(params, updates, key=KEY)
        assert_same_bits(ours, optax.apply_updates(params, updates))


@pytest.mark.parametrize("key", [None, KEY], ids=["nearest", "stochastic"])
def test_none_leaves_a_leaf_as_it_is(key):
    params = {
        "bf16": normal(0, 6, dtype=jnp.bfloat16),
        "codes": gj.quant.quantize(normal(1, 4, 64)),
        "plain": normal(2, 3),
        "nothing": None,
    }
    new = gj.apply_updates(params, dict.fromkeys(params), key=key)
    assert_same_bits(new, params)


def test_bf16_without_a_key_is_optax():
    params, updates = (normal(seed, 50, 40, dtype=jnp.bfloat16) for seed in (0, 1))
    assert_same_bits(
        gj.apply_updates({"w": params}, {"w": updates}, key=None),
        optax.apply_updates({"w": params}, {"w": updates}),
    )


# bf16


@pytest.mark.parametrize("scale", [2.0**-9, 2.0**-6, 1.0, 100.0])
def test_bf16_is_rounded_to_one_of_two_neighbours_without_bias(scale):
    param = normal(0, 40, 20, scale=3.0, dtype=jnp.bfloat16)  # of both signs
    update = normal(1, 40, 20, scale=scale, dtype=jnp.bfloat16)
    exact = np.asarray(param, np.float64) + np.asarray(update, np.float64)
    exact = exact.astype(np.float32).astype(np.float64)  # the sum is taken in fp32
    results = over_keys(param, update, 1000)
    below = truncated(exact)
    gap = np.where(np.abs(below) > 0, 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7), 2.0**-130)
    above = below + np.sign(exact) * gap
    assert np.all((results == below) | (results == above))
    on_grid = exact == below
    assert np.all(results[:, on_grid] == exact[on_grid])
    if scale < 1:
        assert np.mean(on_grid) < 0.2
        assert np.mean(np.std(results, axis=0) > 0) > 0.7
    assert_unbiased(results, exact, gap)


def truncated(x):
    """Towards zero, to the 8 bits of bf16; by hand."""
    word = np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return word.view(np.float32).astype(np.float64)


def test_fp32_updates_of_bf16_parameters_are_not_narrowed_first():
    """2**-12 of a step each: a bf16 sum would not see them."""
    param = jnp.ones(4096, jnp.bfloat16)
    update = jnp.full(4096, 2.0**-7 * (1 + 2.0**-12) / 16, jnp.float32)
    results = over_keys(param, update, 100)
    assert_unbiased(results, np.float64(1.0) + np.asarray(update, np.float64), 2.0**-7)


@pytest.mark.parametrize("seed", range(3))
def test_a_zero_update_changes_no_bit_of_bf16(seed):
    word = np.random.default_rng(0).integers(2**16, size=5000, dtype=np.uint16)
    param = jax.lax.bitcast_convert_type(jnp.asarray(word), jnp.bfloat16)
    tiny = jnp.abs(param) < 2.0**-126  # XLA flushes what is not a normal number
    param = (
        jnp.where(jnp.isnan(param) | tiny, jnp.bfloat16(0), param)
        .at[:2]
        .set(jnp.asarray([jnp.inf, -jnp.inf], jnp.bfloat16))
    )
    new = gj.apply_updates({"w": param}, {"w": jnp.zeros_like(param)}, key=jax.random.key(seed))[
        "w"
    ]
    np.testing.assert_array_equal(np.asarray(new, np.float32), np.asarray(param, np.float32))


def test_infinities_and_nan_stay_what_they_are():
    param = jnp.asarray([np.inf, -np.inf, np.nan, 1.0, 1.0, -1.0], jnp.bfloat16)
    update = jnp.asarray([1.0, 1.0, 1.0, np.inf, np.nan, -np.inf], jnp.bfloat16)
    for seed in range(20):
        new = gj.apply_updates({"w": param}, {"w": update}, key=jax.random.key(seed))["w"]
        np.testing.assert_array_equal(
            np.asarray(new, np.float32), [np.inf, -np.inf, np.nan, np.inf, np.nan, -np.inf]
        )
    # A NaN whose payload lies in the bits that bf16 lacks, and noise that would carry into them.
    nan = jax.lax.bitcast_convert_type(jnp.uint32(0x7F800001), jnp.float32)
    assert np.isnan(float(stochastic_bfloat16(nan, jnp.float32(0.0))))
    largest = jax.lax.bitcast_convert_type(jnp.uint32(0x7F7FFFFF), jnp.float32)
    assert float(stochastic_bfloat16(largest, jnp.float32(0.0))) == float(
        jnp.finfo(jnp.bfloat16).max
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 65535 / 65536])
def test_bf16_is_rounded_up_for_just_so_much_noise(sign, fraction):
    """Away from zero if and only if the noise reaches one minus the fraction."""
    x = jnp.full(8, sign * (1 + 2.0**-7 * fraction), jnp.float32)
    edge = 1 - fraction
    noise = jnp.asarray(
        [0.0, edge / 2, edge - 2.0**-16, edge - 2.0**-24, edge, edge + 2.0**-17, 0.75, 1 - 2.0**-24]
    )
    noise = jnp.clip(noise, 0, 1 - 2.0**-24).astype(jnp.float32)
    up = np.asarray(noise) >= edge
    expected = np.where(up, 1 + 2.0**-7, 1.0) * sign
    np.testing.assert_array_equal(np.asarray(stochastic_bfloat16(x, noise), np.float64), expected)


def test_small_updates_move_bf16_weights_only_with_a_key():
    """1000 updates of a twentieth of a step are fifty steps, or none."""
    step = 2.0**-7  # above one; below one it is half of that
    start = {"w": jnp.ones(300, jnp.bfloat16)}
    update = {"w": jnp.full(300, step / 20, jnp.bfloat16)}
    moved = moved_by(start, update, 1000, key=KEY) / step
    assert abs(moved - 50) < 1.5
    assert moved_by(start, update, 1000, key=None) == 0


def moved_by(params, update, steps, key):
    """How far the mean of the leaf gets."""

    def body(i, params):
        step_key = None if key is None else jax.random.fold_in(key, i)
        return gj.apply_updates(params, update, key=step_key)

    end = jax.jit(lambda p: jax.lax.fori_loop(0, steps, body, p))(params)
    before, after = (np.asarray(gj.quant.dequantize(p["w"]), np.float64) for p in (params, end))
    return np.mean(after - before)


# INT8 and INT4


def stored(bits=8, axis=-1, shape=(24, 96), block=32, seed=3):
    scale = np.exp(np.random.default_rng(seed).normal(size=shape))
    return array.quantize(normal(seed, *shape) * scale, bits=bits, block=block, axis=axis)


def steps_of(param):
    """Step of every entry."""
    repeat = np.repeat(np.asarray(param.scales, np.float64), param.block, axis=param.axis)
    return np.take(repeat, range(param.length), axis=param.axis)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [0.05, 1.0, 30.0])
def test_codes_are_rounded_without_bias(bits, axis, size):
    """Small updates, on the old grid, and such as need another one."""
    param = stored(bits, axis)
    update = jnp.asarray(size * steps_of(param), jnp.float32) * normal(4, *param.shape)
    exact = np.asarray(array.decode(param), np.float64) + np.asarray(update, np.float64)
    results = over_keys(param, update, 600)
    # A new grid covers the range of the sum with one code in reserve.
    new = gj.apply_updates({"w": param}, {"w": update}, key=KEY)["w"]
    assert np.any(new.scales != param.scales)
    step = steps_of(new)  # does not depend on the key
    assert np.all(np.abs(results - exact) < 1.01 * step)
    assert_unbiased(results, exact, step)


@pytest.mark.parametrize("key", [None, KEY], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_zero_update_changes_no_bit_of_the_codes(bits, axis, key):
    shapes = [(24, 96), (3, 5, 7), (2, 33), (4, 300)]
    params = [jax.jit(lambda s=s: stored(bits, axis, s))() for s in shapes]
    zeros = [jnp.zeros(shape) for shape in shapes]
    assert_same_bits(apply(params, zeros, key), params)
    # Nor where the grid has been chosen by an update before.
    updates = [normal(seed, *shape, scale=0.1) for seed, shape in enumerate(shapes)]
    moved = apply(params, updates, jax.random.key(8))
    assert_same_bits(apply(moved, zeros, key), moved)


def test_an_entry_without_update_stays_in_a_block_that_keeps_its_grid():
    """Noise is in proportion to the update: what is not updated is not shaken."""
    param = stored()
    inside = np.abs(np.asarray(array.decode(param))) < 0.5 * np.max(
        np.abs(np.asarray(array.decode(param))), axis=-1, keepdims=True
    )
    mask = inside & (np.arange(96) % 2 == 0)
    update = jnp.asarray(np.where(mask, 0.3 * steps_of(param), 0.0), jnp.float32)
    new = gj.apply_updates({"w": param}, {"w": update}, key=KEY)["w"]
    kept = np.asarray(new.scales == param.scales)
    assert np.mean(kept) > 0.6  # others are wider than they need be
    kept = np.repeat(kept, 32, axis=-1)
    changed = np.asarray(new.codes != param.codes)
    assert not np.any(changed[kept & ~mask])
    assert 0.2 < np.mean(changed[kept & mask]) < 0.4


@pytest.mark.parametrize("bits", [8, 4])
def test_without_a_key_codes_are_rounded_to_nearest(bits):
    param = stored(bits)
    update = jnp.asarray(3 * steps_of(param), jnp.float32) * normal(4, *param.shape)
    exact = np.asarray(array.decode(param), np.float64) + np.asarray(update, np.float64)
    new = gj.apply_updates({"w": param}, {"w": update}, key=None)["w"]
    assert np.all(np.abs(np.asarray(array.decode(new)) - exact) <= 0.502 * steps_of(new))


@pytest.mark.parametrize("bits", [8, 4])
def test_small_updates_move_codes_only_with_a_key(bits):
    """1000 updates of a twentieth of a step are fifty steps, or none."""
    # The ends of the range hold the grid in place and are not updated.
    row = np.linspace(0.0, 0.02, 256)
    row[0], row[1] = -1.0, 1.0
    param = array.quantize(jnp.asarray(np.tile(row, (8, 1)), jnp.float32), bits=bits)
    step = float(param.scales[0, 0])
    per_step = step / 20 if bits == 8 else step / 400  # 50 steps would leave a grid of 16 codes
    update = np.full((8, 256), per_step)
    update[:, :2] = 0
    moved = moved_by({"w": param}, {"w": jnp.asarray(update, jnp.float32)}, 1000, key=KEY)
    expected = 1000 * np.mean(update)
    noise = step * np.sqrt(1000 * per_step / step / (8 * 254))
    assert abs(moved - expected) < 5 * noise < 0.1 * expected
    assert moved_by({"w": param}, {"w": jnp.asarray(update, jnp.float32)}, 1000, key=None) == 0


def test_the_form_is_kept():
    for param in (stored(), stored(4, -2, (3, 5, 7)), stored(8, -1, (2, 33), 10_000)):
        new = apply({"w": param}, {"w": normal(0, *param.shape)}, KEY)["w"]
        assert jax.tree.structure(new) == jax.tree.structure(param)
        for one, other in zip(jax.tree.leaves(new), jax.tree.leaves(param), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_bf16_updates_of_codes_that_decode_to_bf16():
    param = array.quantize(normal(0, 8, 64, dtype=jnp.bfloat16), block=16)
    update = normal(1, 8, 64, scale=0.01, dtype=jnp.bfloat16)
    new = apply({"w": param}, {"w": update}, KEY)["w"]
    wide = apply({"w": param}, {"w": update.astype(jnp.float32)}, KEY)["w"]
    assert new.dtype == jnp.bfloat16
    assert_same_bits(new, wide)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_spoils_its_block_alone(bad):
    param = stored()
    update = jnp.zeros(param.shape).at[2, 40].set(bad)
    new = gj.apply_updates({"w": param}, {"w": update}, key=KEY)["w"]
    spoiled = np.zeros(param.shape, bool)
    spoiled[2, 32:64] = True
    decoded = np.asarray(array.decode(new))
    np.testing.assert_array_equal(np.isnan(decoded), spoiled)
    np.testing.assert_array_equal(decoded[~spoiled], np.asarray(array.decode(param))[~spoiled])


# Keys

KINDS = {
    "bf16": lambda shape: normal(5, *shape, dtype=jnp.bfloat16),
    "int8": lambda shape: stored(8, -1, shape),
    "int4": lambda shape: stored(4, -2, shape),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_key_and_the_path_choose_the_bits(kind):
    param = KINDS[kind]((24, 96))
    update = normal(6, 24, 96, scale=0.02)

    def new(name="w", key=KEY):
        return gj.apply_updates({name: param}, {name: update}, key=key)[name]

    def differ(one, other):
        one, other = (np.asarray(gj.quant.dequantize(x), np.float32) for x in (one, other))
        return np.mean(one != other)

    assert_same_bits(new(), new())
    assert_same_bits(new(), jax.jit(lambda: new())())
    assert_same_bits(new(), new(key=jax.random.wrap_key_data(jax.random.key_data(KEY))))
    assert_same_bits(new(), new(key=jax.random.key_data(KEY)))  # a raw key
    assert differ(new(), new(key=jax.random.key(1))) > 0.05
    assert differ(new(), new("v")) > 0.05
    both = gj.apply_updates({"v": param, "w": param}, {"v": update, "w": update}, key=KEY)
    assert_same_bits(both, {"v": new("v"), "w": new("w")})


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_of_a_stack_is_rounded_as_inside_the_stack(kind):
    shape = (3, 24, 64)
    param, update = KINDS[kind](shape), normal(7, *shape, scale=0.02)
    new = apply({"w": param}, {"w": update}, KEY)["w"]

    @jax.jit
    def alone(part, update, layer):
        noise = keys.rounding_noise(keys.fold_in(keys.leaf_key(KEY, "w"), layer), shape[1:])
        if kind == "bf16":
            return noise, stochastic_bfloat16(part.astype(jnp.float32) + update, noise)
        return noise, array.add(part, update, noise)

    rounded = []
    for layer in range(3):
        part = jax.tree.map(lambda x, i=layer: x[i], param)
        noise, one = alone(part, update[layer], layer)
        assert_same_bits(one, jax.tree.map(lambda x, i=layer: x[i], new))
        rounded.append(noise)
    assert np.max(np.abs(np.corrcoef(np.reshape(rounded, (3, -1)))) - np.eye(3)) < 0.1


def test_noise_is_uniform_and_below_one():
    noise = np.asarray(keys.rounding_noise(keys.leaf_key(KEY, "w"), (4, 100, 100)))
    assert noise.dtype == np.float32 and noise.min() >= 0 and noise.max() < 1
    counts, _ = np.histogram(noise, bins=16, range=(0, 1))
    assert np.sum((counts - 2500) ** 2 / 2500) < 45  # chi squared, 15 degrees of freedom


# Trees


def test_boxed_leaves():
    plain = {"a": stored(), "b": normal(0, 6, dtype=jnp.bfloat16), "c": normal(1, 6)}
    updates = {"a": normal(2, 24, 96), "b": normal(3, 6, dtype=jnp.bfloat16), "c": normal(4, 6)}

    def box(tree):
        return {name: nn.Partitioned(leaf, ("x",)) for name, leaf in tree.items()}

    new = gj.apply_updates(box(plain), box(updates), key=KEY)
    assert {name: type(leaf) for name, leaf in new.items()} == dict.fromkeys("abc", nn.Partitioned)
    assert new["a"].names == ("x",)
    assert isinstance(new["a"].value, gj.quant.QuantizedArray)
    # Unboxed, a leaf has the same path and so the same noise.
    expected = gj.apply_updates(plain, updates, key=KEY)
    assert_same_bits({name: leaf.value for name, leaf in new.items()}, expected)


def test_a_leaf_alone_is_a_tree():
    new = gj.apply_updates(stored(), normal(0, 24, 96), key=KEY)
    assert isinstance(new, gj.quant.QuantizedArray)


@pytest.mark.parametrize("shape", [(96, 24), (24, 1), (24,), (24, 95)])
def test_an_update_of_another_shape_is_refused_by_the_leaf(shape):
    params, updates = {"block": {"up": stored()}}, {"block": {"up": jnp.zeros(shape)}}
    with pytest.raises(ValueError, match=r"block/up.*\(24, 96\)"):
        gj.apply_updates(params, updates, key=KEY)


def test_a_key_has_to_be_thought_about():
    with pytest.raises(TypeError, match="key"):
        gj.apply_updates({"w": stored()}, {"w": jnp.zeros((24, 96))})
