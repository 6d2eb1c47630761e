"""One rule for randomness: the same seed, step, leaf and matrix always give the same bits.

key = fold_in(fold_in(fold_in(key(seed), count), hash of the leaf path), matrix index)

The path hash is stable across processes and Python versions, so replicas agree, a resumed run
repeats exactly, and a slice of a stack of layers draws what it drew inside the stack.
"""

import zlib
from typing import Any

import jax
import numpy as np


def path_hash(path: str) -> int:
    """Hash of a leaf path, the same in every process and Python version; fits in uint32."""
    return zlib.crc32(path.encode())


def matrix_keys(
    seed: int, count: jax.Array, hashed_paths: np.ndarray, indices: np.ndarray
) -> jax.Array:
    """Keys of many matrices at one optimizer step, drawn in one go.

    Args:
      seed: Seed of the transformation.
      count: int32 scalar, the optimizer step.
      hashed_paths: `path_hash` of each matrix' leaf.
      indices: Number of each matrix along the flattened batch axes of its leaf.

    Returns:
      Keys, one per matrix.
    """
    key = jax.random.fold_in(jax.random.key(seed), count)

    def matrix_key(hashed_path: Any, index: Any) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, hashed_path), index)

    words = hashed_paths.astype(np.uint32), indices.astype(np.uint32)
    return jax.vmap(matrix_key)(*words)
