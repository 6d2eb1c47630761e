"""The noise of stochastic rounding: uniform, independent, the same inside and outside a stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax import keys

KEY = np.asarray([0x12345678, 0x9ABCDEF0], np.uint32)
SIZE = 1 << 16
rounding_noise = jax.jit(keys.rounding_noise, static_argnums=1)
fold_in = jax.jit(keys.fold_in)


def noise(number, size=SIZE):
    return np.asarray(rounding_noise(fold_in(KEY, number), (size,)), np.float64)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_form(shape):
    x = rounding_noise(KEY, shape)
    assert x.shape == shape and x.dtype == jnp.float32
    assert np.all((np.asarray(x) >= 0) & (np.asarray(x) < 1))
    assert np.all(np.asarray(x, np.float64) * 2**24 % 1 == 0)
    assert len(np.unique(x)) == x.size


def test_uniform():
    x = noise(0)
    # chi-squared with 255 degrees of freedom: 5 deviations are 113.
    for digits in (x, x * 256 % 1, x * 2**16 % 1):
        counts = np.bincount((digits * 256).astype(int), minlength=256)
        assert abs(np.sum((counts - SIZE / 256) ** 2) / (SIZE / 256) - 255) < 5 * np.sqrt(2 * 255)
    assert np.max(x) > 1 - 1e-3 and np.min(x) < 1e-3


def correlation(x, y):
    return np.mean((x - 0.5) * (y - 0.5)) * 12


LIMIT = 5 / np.sqrt(SIZE)


@pytest.mark.parametrize("lag", [1, 2, 3, 16, 256, 1024])
def test_entries_are_independent(lag):
    x = noise(1)
    assert abs(correlation(x[lag:], x[:-lag])) < LIMIT * np.sqrt(SIZE / (SIZE - lag))


def test_keys_are_independent():
    draws = [noise(number) for number in range(8)]
    for i, x in enumerate(draws):
        for y in draws[:i]:
            assert abs(correlation(x, y)) < LIMIT
            assert abs(correlation(x[1:], y[:-1])) < 1.01 * LIMIT
    # One bit of the key, in either word.
    for word, bit in [(0, 0), (0, 31), (1, 0), (1, 31)]:
        other = KEY.copy()
        other[word] ^= np.uint32(1 << bit)
        x, y = (np.asarray(rounding_noise(key, (SIZE,)), np.float64) for key in (KEY, other))
        assert abs(correlation(x, y)) < LIMIT
    # The mean over many steps of the noise of one entry.
    firsts = jax.vmap(lambda n: keys.rounding_noise(keys.fold_in(KEY, n), (3, 2)))(jnp.arange(SIZE))
    np.testing.assert_allclose(np.mean(np.asarray(firsts, np.float64), 0), 0.5, atol=LIMIT / 3)


@pytest.mark.parametrize("shape", [(4, 3, 5), (3, 2, 3, 5)])
def test_a_slice_of_a_stack_draws_what_it_draws_inside(shape):
    stack = rounding_noise(KEY, shape)
    for layer in range(shape[0]):
        alone = rounding_noise(fold_in(KEY, layer), shape[1:])
        np.testing.assert_array_equal(stack[layer], alone)
    assert len(np.unique(stack)) == stack.size


def test_mapped_and_jitted():
    batch = jnp.stack([fold_in(KEY, number) for number in range(3)])
    mapped = jax.vmap(lambda key: keys.rounding_noise(key, (3, 5)))(batch)
    for key, x in zip(batch, mapped, strict=True):
        np.testing.assert_array_equal(x, keys.rounding_noise(key, (3, 5)))


def test_fold_in():
    folded = np.asarray(jax.vmap(lambda number: keys.fold_in(KEY, number))(jnp.arange(SIZE)))
    assert folded.dtype == np.uint32 and folded.shape == (SIZE, 2)
    assert len(np.unique(folded[:, 0])) == SIZE
    assert not np.any(np.all(folded == KEY, -1))
    # Every bit is set half of the time.
    bits = (folded[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    np.testing.assert_allclose(bits.mean(0), 0.5, atol=2.5 / np.sqrt(SIZE))
    np.testing.assert_array_equal(fold_in(KEY, 5), folded[5])
    np.testing.assert_array_equal(keys.fold_in(KEY, np.uint32(2**32 - 1)).shape, (2,))
    # The order counts.
    assert np.any(fold_in(fold_in(KEY, 1), 2) != fold_in(fold_in(KEY, 2), 1))
    # Both words count.
    for word in (0, 1):
        other = KEY.copy()
        other[word] += np.uint32(1)
        assert fold_in(other, 3)[1] != folded[3, 1]


def test_leaf_key():
    key = jax.random.key(0)
    one = keys.leaf_key(key, "layers/0/kernel")
    assert one.shape == (2,) and one.dtype == jnp.uint32
    np.testing.assert_array_equal(one, keys.leaf_key(jax.random.key_data(key), "layers/0/kernel"))
    np.testing.assert_array_equal(
        one, jax.jit(keys.leaf_key, static_argnums=1)(key, "layers/0/kernel")
    )
    assert np.any(one != keys.leaf_key(key, "layers/1/kernel"))
    assert np.any(one != keys.leaf_key(jax.random.key(1), "layers/0/kernel"))
    rbg = keys.leaf_key(jax.random.key(0, impl="rbg"), "w")
    assert rbg.shape == (2,) and rbg.dtype == jnp.uint32


PINNED = [[[11349129, 5166819], [1043381, 13202070]], [[1281727, 9492376], [11629869, 1335716]]]


def test_the_bits_are_these():
    """A resumed run repeats exactly, in another process and with another version."""
    np.testing.assert_array_equal(
        np.asarray(rounding_noise(KEY, (2, 2, 2)), np.float64) * 2**24, PINNED
    )
