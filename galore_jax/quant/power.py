"""Power maps: 8 bits over many decades, for the moments of an optimizer.

A block is divided by its greatest magnitude, and a root of the result is rounded to a uniform grid:
the square root for numbers of both signs, the fourth root for positive ones. So the relative error
is nearly the same over several decades, where it matters for numbers that others are divided by.
On the gradients of a real run Adam's update of block matrices comes out a third closer to that of
fp32 moments than with the dynamic maps of bitsandbytes (`benchmarks/moment_accuracy.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.leaves import OneLeaf
from galore_jax.quant import blocks
from galore_jax.serialization import Known, register


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PowerArray(OneLeaf, metaclass=Known):
    """A floating array in blocks of codes of a power map.

    Invariants:
      * signed: entry = sign(c)·(c / 127)² · scale with c = code - 127;
        unsigned: entry = (code / 255)⁴ · scale;
      * scale is the greatest magnitude of the block, which is stored exactly; so is zero;
      * `codes` is uint8 of the shape of the array; `scales` is fp32 and has a number per block
        along `axis`;
      * leading axes lead in both parts.

    Args:
      codes: Bytes.
      scales: fp32.
      signed: Whether entries have both signs.
      block: Entries per block.
      axis: -1 or -2, the axis that blocks run along.
      dtype: What it decodes to.

    Example:
      >>> import jax.numpy as jnp, optax, galore_jax as gj
      >>> state = gj.scale_by_adam8bit().init({"w": jnp.ones((64, 128))})
      >>> isinstance(state.nu["w"], gj.quant.PowerArray), state.nu["w"].shape
      (True, (64, 128))
    """

    codes: jax.Array
    scales: jax.Array
    signed: bool = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape


register(PowerArray, "codes", "scales")


def encode(x: jax.Array, *, signed: bool, block: int = 256, axis: int = -1) -> PowerArray:
    """Codes of an array, its root rounded to nearest.

    Args:
      x: Real floating array; not negative if it is not `signed`.
      signed: Whether it has both signs.
      block: Entries per block.
      axis: -1 or -2, the axis that blocks run along.

    Returns:
      A `PowerArray`. A positive entry of an unsigned array is never stored as zero, because it is
      going to be divided by: it gets the least positive code at least. Blocks with a NaN or an
      infinity become NaN.
    """
    split = blocks.split(x.astype(jnp.float32), block, axis)
    scale = jnp.max(jnp.abs(split), axis)
    # Not a normal number: the block is as good as zero, and its inverse would overflow.
    scale = jnp.where(scale < 2.0**-126, 0, jnp.where(jnp.isinf(scale), jnp.nan, scale))
    # The inverse of a very large number would not be a normal one either.
    shrink = jnp.where(scale > 1, 2.0**-64, 1.0).astype(jnp.float32)
    inverse = jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale * shrink))
    part = (split * jnp.expand_dims(shrink, axis)) * jnp.expand_dims(inverse, axis)
    top = _top(signed)
    if signed:
        codes = jnp.round(jnp.sign(part) * jnp.sqrt(jnp.abs(part)) * top) + top
    else:
        root = jnp.round(jnp.sqrt(jnp.sqrt(part)) * top)
        codes = jnp.maximum(root, (split > 0).astype(jnp.float32))
    codes = jnp.clip(codes, 0, 2 * top if signed else top).astype(jnp.uint8)
    codes = blocks.join(codes, x.shape[axis], axis)
    return PowerArray(codes, scale, signed, block, axis, x.dtype)


def encode_like(x: jax.Array, like: PowerArray) -> PowerArray:
    """`x`, stored as `like` is."""
    x = x.astype(like.dtype)
    return encode(x, signed=like.signed, block=like.block, axis=like.axis)


def decode(x: PowerArray) -> jax.Array:
    """The array, in its dtype."""
    codes, top = x.codes.astype(jnp.float32), _top(x.signed)
    if x.signed:
        root = (codes - top) / top
        part = root * jnp.abs(root)
    else:
        root = codes / top
        part = (root * root) * (root * root)
    return (part * blocks.spread(x.scales, x.shape[x.axis], x.block, x.axis)).astype(x.dtype)


def _top(signed: bool) -> int:
    return 127 if signed else 255
