"""One rule for randomness: the same seed, step, leaf and matrix always give the same bits.

A matrix' key mixes the seed, the optimizer step, a hash of the leaf's path and the number of the
matrix in its leaf. Replicas agree, a resumed run repeats exactly, and a slice of a stack of layers
draws what it drew inside the stack.

A key is two uint32 words, so it serves as a raw key for `jax.random`. Deriving keys and drawing
sketches with it would do, but made up a third of the time to compile an update; the hash below is
one fused elementwise loop.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_GOLDEN = np.uint32(0x9E3779B9)


def matrix_keys(
    seed: int,
    count: jax.Array,
    path: str | Sequence[str],
    batch_shape: tuple[int, ...],
    layer: jax.Array | int = 0,
) -> jax.Array:
    """Keys of the matrices of one leaf, or of several equal ones, at one optimizer step.

    Args:
      seed: Seed of the transformation; 32 bits of it count.
      count: int32 scalar, the optimizer step.
      path: "/"-joined path of the leaf, or of each of them.
      batch_shape: Shape of its batch axes.
      layer: For a slice of one layer out of a stack of layers, the number of the layer.

    Returns:
      ``uint32[*batch, 2]``; ``uint32[leaves, *batch, 2]`` for several.
    """
    size = math.prod(batch_shape)
    index = np.arange(size, dtype=np.uint32).reshape(batch_shape)
    index = index + jnp.asarray(layer, jnp.uint32) * np.uint32(size)
    word = _mix(jnp.asarray(seed & 0xFFFFFFFF, jnp.uint32) + _GOLDEN)
    # crc32: the same in every process and Python version, unlike hash().
    if isinstance(path, str):
        hashes: Any = np.uint32(zlib.crc32(path.encode()))
    else:
        words = np.asarray([zlib.crc32(one.encode()) for one in path], np.uint32)
        hashes, index = words.reshape(-1, *[1] * len(batch_shape)), index[None]
    for part in (count.astype(jnp.uint32), hashes, index):
        word = _mix(word ^ part) + _GOLDEN
    return jnp.stack([word, _mix(word)], axis=-1)


def leaf_key(key: jax.Array, path: str) -> jax.Array:
    """Key of the leaf of such a path, ``uint32[2]``, from a `jax.random` key of any kind."""
    return fold_in(jax.random.bits(key, (2,), jnp.uint32), zlib.crc32(path.encode()))


def fold_in(key: jax.Array, number: jax.Array | int) -> jax.Array:
    """Another key for every number, ``uint32[2]``."""
    word = _mix(key[0] ^ _mix(jnp.asarray(number, jnp.uint32) + _GOLDEN))
    return jnp.stack([word, _mix(word + key[1])])


def rounding_noise(key: jax.Array, shape: tuple[int, ...], layer: jax.Array | int = 0) -> jax.Array:
    """Multiples of 2⁻²⁴ in [0, 1), fp32, one per entry, for stochastic rounding.

    Entry i of a leading axis beyond the last two gets what ``fold_in(key, i)`` gives alone: a slice
    of a stack of layers is rounded as it is inside the stack.

    Args:
      key: ``uint32[2]``.
      shape: Shape of the result.
      layer: For a slice ``[1, ...]`` of one layer out of a stack, the number of the layer.
    """
    first = jnp.asarray(layer, jnp.uint32)
    if len(shape) > 2:
        numbers = first + jnp.arange(shape[0], dtype=jnp.uint32)
        keys = jax.vmap(lambda i: fold_in(key, i))(numbers)
        return jax.vmap(lambda k: rounding_noise(k, shape[1:]))(keys)
    start = first * np.uint32(math.prod(shape[1:]))
    return (_bits(key, shape, start) >> 8).astype(jnp.float32) * np.float32(2.0**-24)


def uniform(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Random numbers between -1 and 1: all the randomness that a sketch needs.

    Args:
      key: ``uint32[2]``.
      shape: Shape of the result.
      dtype: Its floating dtype.
    """
    return _bits(key, shape).astype(jnp.int32).astype(dtype) * 2.0**-31


def _bits(key: jax.Array, shape: tuple[int, ...], start: jax.Array | int = 0) -> jax.Array:
    counter = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    counter = counter + jnp.asarray(start, jnp.uint32)
    return _mix(_mix(counter ^ key[0]) + key[1])


@jax.jit  # one function in a program, however often it is called
def _mix(word: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every input bit flips about half of the output bits."""
    word = (word ^ (word >> 16)) * np.uint32(0x21F0AAAD)
    word = (word ^ (word >> 15)) * np.uint32(0xD35A2D97)
    return word ^ (word >> 15)
