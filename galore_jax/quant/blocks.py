"""Blocks of consecutive entries along one axis; the last block may be shorter.

The axis is -1 or -2, counted from the end, so that leading axes may be sliced off or mapped over.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.checks import check_count


def split(x: jax.Array, block: int, axis: int) -> jax.Array:
    """``[..., n, ...] -> [..., n_blocks, block, ...]``, entries of a block along `axis`.

    A short last block is filled up with zeros.
    """
    size = x.shape[axis]
    block = min(block, size)
    count = -(-size // block)
    if count * block > size:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, count * block - size)
        x = jnp.pad(x, padding)
    shape = list(x.shape)
    shape[axis : axis + 1 or None] = [count, block]
    return x.reshape(shape)


def join(blocks: jax.Array, size: int, axis: int) -> jax.Array:
    """Inverse of `split`."""
    shape = list(blocks.shape)
    end = axis + 1 or None
    shape[axis - 1 : end] = [blocks.shape[axis - 1] * blocks.shape[axis]]
    return jax.lax.slice_in_dim(blocks.reshape(shape), 0, size, axis=len(shape) + axis)


def spread(per_block: jax.Array, size: int, block: int, axis: int) -> jax.Array:
    """``[..., n_blocks, ...] -> [..., size, ...]``: every entry gets the number of its block."""
    wide = jnp.repeat(per_block, min(block, size), axis)
    return jax.lax.slice_in_dim(wide, 0, size, axis=wide.ndim + axis)


def check_block(block: Any) -> int:
    """The entries of a block as a Python integer.

    Raises:
      TypeError: It is no integer.
      ValueError: It is below one, or beyond int32.
    """
    return check_count("block", block)
