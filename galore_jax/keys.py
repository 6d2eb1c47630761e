"""One rule for randomness: the same seed, step, leaf and matrix always give the same bits.

key = fold_in(fold_in(fold_in(key(seed), count), hash of the leaf path), matrix index)

The path hash is stable across processes and Python versions, so replicas agree, a resumed run
repeats exactly, and a slice of a stack of layers draws what it drew inside the stack.
"""

import zlib

import jax


def leaf_key(seed: int, count: jax.Array, path: str) -> jax.Array:
    """Key of one parameter leaf at one optimizer step."""
    key = jax.random.fold_in(jax.random.key(seed), count)
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def matrix_key(key: jax.Array, index: jax.Array | int) -> jax.Array:
    """Key of one matrix of a leaf; `index` counts along the flattened batch axes."""
    return jax.random.fold_in(key, index)
