"""Dynamic code maps: 8 (or 4) bits over many decades, for the moments of an optimizer.

A map of b bits holds zero, one, and in each of E = b - 1 decades below one the midpoints of
equal intervals: twice as many in every next decade, so that large numbers are precise and small
ones exist. A block is divided by its entry of greatest magnitude, *with its sign*: that entry is
then exactly one, and decoding and encoding again changes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.quant import blocks, packing
from galore_jax.views.leaves import OneLeaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DynamicArray(OneLeaf):
    """A floating array in blocks of codes of a dynamic map.

    Invariants:
      * entry = map[code] · scale, with the scale of its block: its entry of greatest magnitude;
      * `codes` is uint8 with the axes of the array (two codes a byte at 4 bits, along `axis`);
        `scales` is fp32 and has a number per block along `axis`;
      * leading axes lead in both parts.

    Args:
      codes: Bytes.
      scales: fp32.
      size: Length of the block axis.
      signed: Whether entries have both signs.
      bits: 4 or 8.
      block: Entries per block.
      axis: -1 or -2, the axis that blocks run along.
      dtype: What it decodes to.

    Example:
      >>> import jax.numpy as jnp, optax, galore_jax as gj
      >>> state = gj.scale_by_adam8bit().init({"w": jnp.ones((64, 128))})
      >>> isinstance(state.nu["w"], gj.quant.DynamicArray), state.nu["w"].shape
      (True, (64, 128))
    """

    codes: jax.Array
    scales: jax.Array
    size: int = dataclasses.field(metadata={"static": True})
    signed: bool = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self.axis] = self.size
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return len(self.codes.shape)


class _Map(NamedTuple):
    """A code map: `table` has the value of every code; decades for finding the nearest one."""

    table: np.ndarray  # [2**bits]
    starts: np.ndarray  # [E] least magnitude that belongs to the decade
    counts: np.ndarray  # [E] codes in the decade
    last: float  # least magnitude that belongs to the code of one


@functools.lru_cache
def code_map(signed: bool, bits: int) -> _Map:
    """The dynamic map; code c > 0 is the c-th magnitude, and -c modulo 2**bits its negative."""
    decades = bits - 1
    counts = 2 ** np.arange(decades) * (1 if signed else 2)
    middles = [
        10.0 ** (i - decades + 1) * (0.1 + 0.9 * (np.arange(n) + 0.5) / n)
        for i, n in enumerate(counts)
    ]
    magnitudes = np.concatenate([[0.0], *middles, [1.0]])
    table = np.concatenate([magnitudes, -magnitudes[-2:0:-1]]) if signed else magnitudes
    between = (magnitudes[1:] + magnitudes[:-1]) / 2
    first = np.concatenate([[0], np.cumsum(counts)])
    return _Map(table.astype(np.float32), between[first[:-1]], counts, float(between[-1]))


def encode(
    x: jax.Array, *, signed: bool, bits: int = 8, block: int = 256, axis: int = -1
) -> DynamicArray:
    """Nearest codes of an array.

    Args:
      x: Real floating array; not negative if it is not `signed`.
      signed: Whether it has both signs.
      bits: 8 or 4.
      block: Entries per block.
      axis: -1 or -2, the axis that blocks run along.

    Returns:
      A `DynamicArray`. A positive entry of an unsigned array is never stored as zero, because it is
      going to be divided by: it gets the least positive code at least. Blocks with a NaN or an
      infinity become NaN.

    References:
      Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021
      (https://arxiv.org/abs/2110.02861).
    """
    split = blocks.split(x.astype(jnp.float32), block, axis)
    high = jnp.max(split, axis)
    if signed:
        low = jnp.min(split, axis)
        high = jnp.where(high >= -low, high, low)
    # Not a normal number: the block is as good as zero, and its inverse would overflow.
    scale = jnp.where(jnp.abs(high) < 2.0**-126, 0, high)
    inverse = jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))
    codes = _nearest(split * jnp.expand_dims(inverse, axis), signed, bits)
    packed = packing.pack(blocks.join(codes, x.shape[axis], axis), bits, axis)
    # Infinity times zero is NaN, so nothing else has to be done about infinities.
    return DynamicArray(packed, scale, x.shape[axis], signed, bits, block, axis, x.dtype)


def encode_like(x: jax.Array, like: DynamicArray) -> DynamicArray:
    """`x`, stored as `like` is."""
    return encode(x, signed=like.signed, bits=like.bits, block=like.block, axis=like.axis)


def decode(x: DynamicArray) -> jax.Array:
    """The array, in its dtype."""
    codes = packing.unpack(x.codes, x.size, x.bits, x.axis)
    table = jnp.asarray(code_map(x.signed, x.bits).table)
    values = jnp.take(table, codes.astype(jnp.int32), mode="clip")
    return (values * blocks.spread(x.scales, x.size, x.block, x.axis)).astype(x.dtype)


def _nearest(x: jax.Array, signed: bool, bits: int) -> jax.Array:
    """Codes of numbers in [-1, 1]."""
    starts, counts, last = code_map(signed, bits)[1:]
    magnitude = jnp.abs(x)
    code = jnp.zeros(x.shape, jnp.float32) if signed else (magnitude > 0).astype(jnp.float32)
    first = 1
    for i, (start, count) in enumerate(zip(starts, counts.tolist(), strict=True)):
        decade = 10.0 ** (i - len(counts) + 1)
        interval = jnp.floor((magnitude / decade - 0.1) * (count / 0.9))
        here = first + jnp.clip(interval, 0, count - 1)
        code = jnp.where(magnitude >= start, here, code)
        first += count
    # There is a one, but no minus one.
    code = jnp.where(x >= last, first, code).astype(jnp.int32)
    return (jnp.where(x < 0, -code, code) & (2**bits - 1)).astype(jnp.uint8)
