"""Two 4-bit codes in one byte.

Neighbours along the block axis share a byte, so that a shard of the bytes holds a shard of the
codes. `jnp.uint4` would pack as well, but it is slower to convert on CPU, reports a byte per code
in `nbytes`, and Orbax cannot save it (`benchmarks/int4_storage.py`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from galore_jax.quant import blocks


def pack(codes: jax.Array, bits: int, axis: int) -> jax.Array:
    """uint8 codes below ``2**bits`` -> bytes; shorter along `axis` for 4 bits."""
    if bits == 8:
        return codes
    if codes.shape[axis] % 2:
        padding = [(0, 0)] * codes.ndim
        padding[axis] = (0, 1)
        codes = jnp.pad(codes, padding)
    shape = list(codes.shape)
    shape[axis : axis + 1 or None] = [codes.shape[axis] // 2, 2]
    pairs = jnp.moveaxis(codes.reshape(shape), axis, 0)
    return pairs[0] | (pairs[1] << 4)


def unpack(packed: jax.Array, size: int, bits: int, axis: int) -> jax.Array:
    """Inverse of `pack`, for `size` codes along `axis`."""
    if bits == 8:
        return packed
    pairs = jnp.stack([packed & 15, packed >> 4], axis=packed.ndim + axis + 1)
    return blocks.join(pairs, size, axis)
