"""Laws of blockwise integer codes, over bits x layout x dtype x rounding."""

import functools
import itertools
from typing import NamedTuple

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax.quant import quantize
from galore_jax.quant.array import decode

# Rounding errors of a position, and what rounding the step to 21 bits moves the far end by.
SLIP = 1e-3
# Below this XLA flushes to zero on some devices; it is the least step as well.
NORMAL = 2.0**-126

# shape, block, axis
LAYOUTS = {
    "shorter than a block": ((3, 40), 64, -1),
    "exactly a block": ((2, 64), 64, -1),
    "not a multiple": ((2, 3, 150), 64, -1),
    "odd": ((3, 77), 32, -1),
    "one entry": ((5, 1), 16, -1),
    "blocks of one": ((2, 7), 1, -1),
    "one axis": ((101,), 32, -1),
    "columns": ((77, 5), 32, -2),
    "columns of a stack": ((2, 50, 3), 16, -2),
}
BITS = [8, 4]
ROUNDING = ["nearest", "stochastic"]
# A program is compiled for each.
CASES = [
    *itertools.product(BITS, LAYOUTS, ["float32"], ["nearest"]),
    *itertools.product(BITS, ["not a multiple", "odd", "columns"], ["float32"], ["stochastic"]),
    *itertools.product([8], ["one axis"], ["bfloat16", "float16", "float64"], ROUNDING),
    *itertools.product([4], ["columns of a stack"], ["bfloat16", "float64"], ["nearest"]),
]
NEAREST = [case[:3] for case in CASES if case[3] == "nearest"]
PRECISION = {"float64": 0, "float32": 0, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def block_of(rng, kind, size):
    """One block of numbers with a known difficulty."""
    normal = rng.normal(size=size)
    return {
        "normal": normal,
        "positive": 1 + np.abs(normal),
        "negative": -3 - np.abs(normal),
        "constant": np.full(size, -0.3),
        "zero": np.zeros(size),
        "spike": np.where(np.arange(size) == size // 2, 1e3, 1e-3 * normal),
        "symmetric": np.resize([1.7, -1.7, 0.0, 0.4], size),
        "few zeros": np.where(normal > 0.5, 0, normal),
    }[kind] * 10.0 ** rng.integers(-3, 2)


def contents(shape, block, axis):
    """An array whose blocks are of all kinds, fp64."""
    kinds = itertools.cycle(
        ["normal", "positive", "negative", "spike", "symmetric", "constant", "zero", "few zeros"]
    )
    rng = np.random.default_rng(3)
    moved = np.zeros(shape) if axis == -1 else np.swapaxes(np.zeros(shape), -1, -2)
    for index in np.ndindex(*moved.shape[:-1]):
        for start in range(0, moved.shape[-1], block):
            part = moved[index][start : start + block]
            part[:] = block_of(rng, next(kinds), part.size)
    return moved if axis == -1 else np.swapaxes(moved, -1, -2)


class Result(NamedTuple):
    """What came out, per entry and with blocks along the last axis, fp64."""

    x: np.ndarray
    codes: np.ndarray
    step: np.ndarray
    zero: np.ndarray
    low: np.ndarray
    high: np.ndarray
    decoded: np.ndarray
    converted: np.ndarray
    quantized: object
    again: object


@functools.partial(jax.jit, static_argnames=("bits", "block", "axis"))
def run(x, key, *, bits, block, axis):
    q = quantize(x, bits=bits, block=block, key=key, axis=axis)
    again = quantize(decode(q), bits=bits, block=block, axis=axis) if key is None else None
    return q, decode(q), q.astype(x.dtype), again


def unpacked(q):
    """Codes one by one: the first of a pair is in the low four bits."""
    codes = np.moveaxis(np.asarray(q.codes), q.axis, -1)
    if q.bits == 4:
        codes = np.stack([codes % 16, codes // 16], -1).reshape(*codes.shape[:-1], -1)
    return codes[..., : q.length]


def per_entry(part, q):
    return np.repeat(np.moveaxis(np.asarray(part, np.float64), q.axis, -1), q.block, -1)[
        ..., : q.length
    ]


def result(x, bits, block, axis, key=None):
    q, decoded, converted, again = run(x, key, bits=bits, block=block, axis=axis)
    assert converted.dtype == x.dtype and decoded.dtype == jnp.float32
    decoded, converted, x = (
        np.moveaxis(np.asarray(part).astype(np.float64), axis, -1)
        for part in (decoded, converted, x)
    )
    low, high = np.zeros_like(x), np.zeros_like(x)
    for start in range(0, x.shape[-1], block):
        part = np.s_[..., start : start + block]
        low[part] = np.minimum(np.min(x[part], -1, keepdims=True), 0)
        high[part] = np.maximum(np.max(x[part], -1, keepdims=True), 0)
    step, zero = per_entry(q.scales, q), per_entry(q.zeros, q)
    return Result(
        x, unpacked(q).astype(np.float64), step, zero, low, high, decoded, converted, q, again
    )


@functools.cache
def case(bits, layout, dtype, rounding):
    shape, block, axis = LAYOUTS[layout]
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(contents(shape, block, axis), dtype)
        assert x.dtype == dtype
        key = jax.random.key(1) if rounding == "stochastic" else None
        return result(x, bits, block, axis, key)


def tolerated(rounding):
    return (0.5 if rounding == "nearest" else 1.0) + SLIP


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


every_case = pytest.mark.parametrize(("bits", "layout", "dtype", "rounding"), CASES)


@every_case
def test_form(bits, layout, dtype, rounding):
    shape, block, axis = LAYOUTS[layout]
    q = case(bits, layout, dtype, rounding).quantized
    bytes_, blocks = list(shape), list(shape)
    bytes_[axis] = shape[axis] if bits == 8 else -(-shape[axis] // 2)
    blocks[axis] = -(-shape[axis] // block)
    assert q.codes.shape == tuple(bytes_) and q.codes.dtype == jnp.uint8
    assert q.scales.shape == q.zeros.shape == tuple(blocks)
    assert q.scales.dtype == jnp.float32 and q.zeros.dtype == jnp.uint8
    assert q.shape == shape and q.dtype == dtype
    assert np.all(np.asarray(q.scales) >= NORMAL) and np.all(np.asarray(q.zeros) < 2**bits)


@every_case
def test_round_trip(bits, layout, dtype, rounding):
    r = case(bits, layout, dtype, rounding)
    error = np.abs(r.decoded - r.x)
    assert np.all(error <= tolerated(rounding) * r.step)
    error = np.abs(r.converted - r.x)
    assert np.all(error <= tolerated(rounding) * r.step + PRECISION[dtype] * (np.abs(r.x) + r.step))


@every_case
def test_the_step_is_no_longer_than_the_range_asks_for(bits, layout, dtype, rounding):
    """And the range contains zero."""
    r = case(bits, layout, dtype, rounding)
    steps = 2**bits - 1 - (rounding == "stochastic")
    np.testing.assert_allclose(
        r.step, np.maximum((r.high - r.low) / steps, NORMAL), rtol=2.0**-20, atol=0
    )


@every_case
def test_zero_is_exact_and_signs_are_kept(bits, layout, dtype, rounding):
    r = case(bits, layout, dtype, rounding)
    assert np.all(r.decoded[r.x == 0] == 0)
    assert np.all(r.decoded * r.x >= 0)


@pytest.mark.parametrize(("bits", "layout", "dtype"), NEAREST)
def test_agrees_with_an_oracle(bits, layout, dtype):
    """s = (hi - lo) / (2^b - 1), z = round(-lo / s), q = round(x / s) + z, in fp64."""
    r = case(bits, layout, dtype, "nearest")
    step = np.maximum((r.high - r.low) / (2**bits - 1), NORMAL)

    def rounded(exact):
        """Nearest integer, and whether it is beyond doubt."""
        return np.round(exact), np.abs(exact - np.floor(exact) - 0.5) > SLIP

    zero, sure = rounded(-r.low / step)
    np.testing.assert_array_equal(r.zero[sure], zero[sure])
    code, sure = rounded(r.x / step)
    code = np.clip(code + r.zero, 0, 2**bits - 1)
    assert np.mean(sure) > 0.8 or r.x.size < 50
    np.testing.assert_array_equal(r.codes[sure], code[sure])
    assert np.all(np.abs(r.codes - code) <= 1)
    np.testing.assert_allclose(r.decoded, (r.codes - r.zero) * r.step, rtol=1e-6)


@pytest.mark.parametrize(("bits", "layout", "dtype"), NEAREST)
def test_quantizing_again_changes_no_bit(bits, layout, dtype):
    r = case(bits, layout, dtype, "nearest")
    q = r.quantized
    for part in ("codes", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(r.again, part), getattr(q, part))


@pytest.mark.parametrize("layout", ["not a multiple", "odd", "columns"])
@pytest.mark.parametrize("bits", BITS)
def test_a_block_alone_gives_the_same(bits, layout):
    """Neither padding nor a neighbour leaks into a block."""
    shape, block, axis = LAYOUTS[layout]
    whole = case(bits, layout, "float32", "nearest")
    full = shape[axis] // block * block
    for part in (np.s_[..., :full], np.s_[..., full:]):
        x = whole.x[part].reshape(-1, min(block, whole.x[part].shape[-1]))
        # A row is one block, and the blocks run along the last axis.
        alone = result(jnp.asarray(x, jnp.float32), bits, block, -1)
        for name in ("codes", "step", "zero", "decoded"):
            np.testing.assert_array_equal(
                getattr(alone, name), getattr(whole, name)[part].reshape(x.shape), name
            )


@pytest.mark.parametrize("bits", BITS)
def test_ties_at_the_ends_of_a_range(bits):
    """Both ends half a step off the grid, where rounding errors decide: still idempotent."""
    step = np.arange(1, 2**12, 2, dtype=np.float32)
    for k in range(0, 2**bits - 1, 1 if bits == 4 else 7):
        low, high = -(k + 0.5) * step, (2**bits - 1.5 - k) * step
        r = result(jnp.asarray(np.stack([low, high], -1)), bits, 2, -1)
        assert np.all(np.abs(r.decoded - r.x) <= tolerated("nearest") * r.step)
        assert_same_bits(r.again, r.quantized)


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_blocks_of_bf16_are_idempotent(bits):
    """Few mantissa bits and |lo| = hi: what bases and small initial weights look like."""
    x = np.random.default_rng(0).normal(size=(20_000, 4))
    x[:, 1] = -x[:, 0]
    r = result(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), bits, 4, -1)
    assert_same_bits(r.again, r.quantized)


def extremes():
    """Rows of one block each."""
    rng = np.random.default_rng(5)
    normal = rng.normal(size=24)
    rows = {
        "tiny": 1e-30 * normal,
        "tiny positive": 1e-30 * np.abs(normal),
        "near the least normal number": 1e-37 * normal,
        "denormal": 1e-40 * normal,
        "huge": np.clip(1e37 * normal, -1e38, 1e38),
        "huge negative": -1e37 * (1 + np.abs(normal)),
        "constant": np.full(24, 7.25),
        "constant negative": np.full(24, -1e-9),
        "zero": np.zeros(24),
        "negative zero": np.full(24, -0.0),
        "one among zeros": np.eye(24)[5],
        "one below zero": -np.eye(24)[23],
        "all decades": 10.0 ** rng.uniform(-44, 37, 24) * np.sign(normal),
    }
    return list(rows), jnp.asarray(np.stack(list(rows.values())), jnp.float32)


@pytest.mark.parametrize("rounding", ROUNDING)
@pytest.mark.parametrize("bits", BITS)
def test_extreme_blocks(bits, rounding):
    names, x = extremes()
    key = jax.random.key(2) if rounding == "stochastic" else None
    r = result(x, bits, 24, -1, key)
    assert np.all(np.isfinite(r.decoded))
    error = np.abs(r.decoded - r.x)
    for name, row, step in zip(names, error, r.step, strict=True):
        assert np.all(row <= tolerated(rounding) * step + NORMAL), name
    assert np.all(r.decoded[r.x == 0] == 0)
    for name in ("constant", "constant negative"):
        row = names.index(name)
        np.testing.assert_allclose(r.decoded[row], r.x[row], rtol=1e-5)
    if rounding == "nearest":
        assert_same_bits(r.again, r.quantized)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("rounding", ROUNDING)
@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_finite_takes_its_block_along(bits, rounding, value):
    shape, block, _ = (3, 77), 32, -1
    key = jax.random.key(1) if rounding == "stochastic" else None
    x = contents(shape, block, -1)
    clean = case(bits, "odd", "float32", rounding)
    x[0, 0] = x[1, 40] = x[2, 76] = value
    dirty = result(jnp.asarray(x, jnp.float32), bits, block, -1, key)
    inside = np.zeros(shape, bool)
    inside[0, :32] = inside[1, 32:64] = inside[2, 64:] = True
    assert np.all(np.isnan(dirty.decoded[inside]))
    assert np.all(np.isnan(dirty.converted[inside]))
    for name in ("codes", "step", "zero", "decoded"):
        np.testing.assert_array_equal(getattr(dirty, name)[~inside], getattr(clean, name)[~inside])
    if rounding == "nearest":
        np.testing.assert_array_equal(
            np.isnan(dirty.again.scales), np.isnan(dirty.quantized.scales)
        )


def test_half_precision_at_the_end_of_its_range():
    """The outermost codes may lie half a step beyond 65504, the greatest float16."""
    x = jnp.asarray([[65504, -65504, 1.0, 0]], jnp.float16)
    for bits in BITS:
        r = result(x, bits, 4, -1)
        assert np.all(np.abs(r.converted - r.x) <= tolerated("nearest") * r.step + 32)


@functools.partial(jax.jit, static_argnames=("bits", "block", "number"))
def many_roundings(x, *, bits, block, number):
    keys = jax.random.split(jax.random.key(7), number)
    return jax.vmap(lambda key: decode(quantize(x, bits=bits, block=block, key=key)))(keys)


@pytest.mark.parametrize("bits", BITS)
def test_stochastic_rounding_is_unbiased(bits):
    """A z-test per entry: extremes of blocks, single signs and constants included."""
    number, block = 20_000, 8
    rng = np.random.default_rng(11)
    rows = np.stack(
        [
            rng.normal(size=20),
            1 + rng.uniform(size=20),
            -2 - rng.uniform(size=20),
            np.resize([1.3, -1.3, 0.2], 20),
            np.full(20, 0.7),
            np.resize([-1.0, 0.01, -0.33], 20),
            np.resize([1.0, -0.01, 0.33], 20),
        ]
    ).astype(np.float32)
    decoded = np.asarray(many_roundings(rows, bits=bits, block=block, number=number), np.float64)
    r = result(jnp.asarray(rows), bits, block, -1, jax.random.key(0))
    error = (decoded - r.x) / r.step
    assert np.max(np.abs(error)) < 1 + SLIP
    exact = r.x / r.step
    fraction = exact - np.floor(exact)
    deviation = np.sqrt(fraction * (1 - fraction) / number)
    # An end may stick out of the grid by 2^-9 of a step.
    assert np.all(np.abs(error.mean(0)) <= 5 * deviation + 2.0**-9 + SLIP / 4)
    np.testing.assert_allclose(error.var(0), fraction * (1 - fraction), atol=0.02)
    # Each entry has noise of its own.
    np.testing.assert_allclose(error.sum((1, 2)).var(), error.var(0).sum(), rtol=0.08)
    np.testing.assert_allclose(error.sum(2).var(0), error.var(0).sum(1), rtol=0.08, atol=0.02)


def test_a_key_decides():
    x = jnp.asarray(contents((3, 77), 32, -1), jnp.float32)
    one, same, other = (
        run(x, key, bits=4, block=32, axis=-1)[0]
        for key in (jax.random.key(1), jax.random.key(1), jax.random.key(2))
    )
    assert_same_bits(one, same)
    assert np.mean(np.asarray(one.codes) != np.asarray(other.codes)) > 0.2
    raw = run(x, jax.random.key_data(jax.random.key(1)), bits=4, block=32, axis=-1)[0]
    assert_same_bits(one, raw)


# Few layouts, so that Hypothesis compiles few programs.
FUZZED = [((2, 6), 4, -1), ((11,), 16, -1), ((7, 2), 3, -2)]


@st.composite
def arrays(draw):
    layout = draw(st.sampled_from(FUZZED))
    elements = draw(
        st.sampled_from(
            [
                st.floats(-(2.0**123), 2.0**123, width=32),
                st.floats(-1, 1, width=16),
                st.integers(-20, 20).map(float),
                st.integers(-255, 255).map(lambda i: i * 0.5),
                st.floats(-(2.0**-120), 2.0**-120, width=32),
                st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3e-39, 1e30, -1e37, 127.5, -127.5]),
            ]
        )
    )
    return draw(hnp.arrays(np.float32, layout[0], elements=elements)), layout


def check(example, bits, seed):
    x, (_, block, axis) = example
    for rounding, key in zip(ROUNDING, (None, jax.random.key(seed)), strict=True):
        r = result(jnp.asarray(x), bits, block, axis, key)
        assert np.all(np.isfinite(r.decoded))
        assert np.all(np.abs(r.decoded - r.x) <= tolerated(rounding) * r.step + NORMAL)
        assert np.all(r.decoded[r.x == 0] == 0)
        assert np.all(r.decoded * r.x >= 0)
        if rounding == "nearest":
            assert_same_bits(r.again, r.quantized)


SETTINGS = {
    "deadline": None, "database": None,
    "suppress_health_check": list(hypothesis.HealthCheck), "print_blob": True,
}  # fmt: skip
given = hypothesis.given(arrays(), st.sampled_from(BITS), st.integers(0, 2**32 - 1))


@hypothesis.settings(max_examples=60, derandomize=True, **SETTINGS)
@given
def test_random_arrays(example, bits, seed):
    check(example, bits, seed)


@pytest.mark.slow
@hypothesis.settings(max_examples=2_000, **SETTINGS)
@given
def test_many_random_arrays(example, bits, seed):
    check(example, bits, seed)
