"""An array stored as blockwise integer codes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.keys import leaf_key, rounding_noise
from galore_jax.quant import affine, blocks, packing
from galore_jax.views.leaves import OneLeaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray(OneLeaf):
    """A floating array of shape ``[..., n]`` in blocks of integer codes along its last axis.

    Invariants:
      * entry = (code - zero) · scale, with scale and zero of its block; scale > 0 is a normal fp32
        number, or NaN in a block that held a NaN or an infinity, all of which is then NaN;
      * ``0 <= zero < 2**bits``: zero lies on the grid, so 0.0 is stored exactly;
      * `codes` is uint8 with the axes of the array; at 4 bits two neighbours share a byte and the
        last axis has ``ceil(n / 2)`` entries;
      * `scales` and `zeros` are ``[..., n_blocks]``, ``n_blocks = ceil(n / block)``; the last
        block may be shorter;
      * leading axes lead in every part: slicing or mapping all parts alike slices the array.

    To a transformation it is one floating leaf of `shape` and `dtype`. It has no tangent:
    differentiate with `galore_jax.quant.value_and_grad`. Arithmetic and `astype` decode it.

    Args:
      codes: Bytes.
      scales: Steps, fp32.
      zeros: Codes of zero, uint8.
      size: n, the length of the last axis.
      bits: 4 or 8.
      block: Entries per block.
      dtype: What it decodes to.
      axis: -1; or -2, which exchanges the last two axes in all of the above.

    Example:
      >>> import jax, jax.numpy as jnp, galore_jax as gj
      >>> stack = gj.quant.quantize(jnp.ones((3, 64, 512)))
      >>> jax.tree.map(lambda part: part[0], stack)
      QuantizedArray(shape=(64, 512), bits=8, block=256, dtype=float32)
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array
    size: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True}, default=-1)

    # numpy must not take over `array * quantized`.
    __array_priority__ = 100

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self.axis] = self.size
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return len(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(self))

    def astype(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The decoded array in another dtype."""
        return decode(self).astype(dtype)

    def __jax_array__(self) -> jax.Array:
        return dequantize(self)

    def __mul__(self, other: Any) -> jax.Array:
        return dequantize(self) * other

    def __rmul__(self, other: Any) -> jax.Array:
        return other * dequantize(self)

    def __repr__(self) -> str:
        return (
            f"QuantizedArray(shape={getattr(self.codes, 'shape', None)}, bits={self.bits}, "
            f"block={self.block}, dtype={jnp.dtype(self.dtype).name})"
        )


def quantize(
    x: jax.Array,
    *,
    bits: int = 8,
    block: int = 256,
    key: jax.Array | None = None,
    axis: int = -1,
) -> QuantizedArray:
    r"""Stores an array in blockwise integer codes.

    Per block of consecutive entries along the last axis, with lo ≤ 0 ≤ hi its range,

    .. math::
      s = \frac{hi - lo}{2^b - 1}, \qquad z = \mathrm{round}(-lo / s), \qquad
      q = \mathrm{round}(x / s) + z.

    With a key, x/s is rounded up with the probability of its fraction, independently for every
    entry, so that the expectation of the result is `x`; one code is kept in reserve for it
    (s = (hi - lo) / (2ᵇ - 2)).

    Args:
      x: Floating array with at least one axis, ``[..., n]``.
      bits: 8 or 4.
      block: Entries per block.
      key: A `jax.random` key for stochastic rounding; None rounds to nearest.
      axis: -1; or -2 for blocks along the axis before the last.

    Returns:
      A `QuantizedArray`. Without a key the error is at most half a step (one step with a key), and
      quantizing the decoded array again gives the same codes. A block that holds a NaN or an
      infinity becomes NaN. Entries below 2⁻¹²⁶ may become zero; those beyond 1e38 may overflow.

    Raises:
      TypeError: `x` is not a real floating array.
      ValueError: Another number of bits, a block below one, or too few axes.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> q = gj.quant.quantize(jnp.linspace(-1.0, 1.0, 512).reshape(2, 256), bits=4)
      >>> q.codes.shape, q.scales.shape, q.nbytes
      ((2, 128), (2, 1), 266)
      >>> float(abs(gj.quant.dequantize(q)[0, 0] + 1.0)) < 1e-3
      True

    References:
      Zhang et al., "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank
      Gradients", 2024 (https://arxiv.org/abs/2407.08296); the range is made to contain zero here.
    """
    _check(x, bits, block, axis)
    split = blocks.split(x.astype(jnp.float32), block, axis)
    bounds = affine.block_range(split, axis)
    grid = affine.fit(bounds, bits, stochastic=key is not None)
    position = affine.positions(split, grid, axis)
    if key is None:
        codes = affine.with_top(affine.nearest(position, bits), split, bounds, bits, axis)
    else:
        noise = blocks.split(rounding_noise(leaf_key(key, ""), x.shape), block, axis)
        codes = affine.stochastic(position, bits, noise)
    return _assemble(codes, grid, x.shape[axis], bits, block, x.dtype, axis)


def dequantize(x: Any) -> jax.Array:
    """The array that a `QuantizedArray` stands for; any other array is returned as it is.

    Args:
      x: A `QuantizedArray` or an array.

    Returns:
      An array of its shape and dtype.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> gj.quant.dequantize(gj.quant.quantize(jnp.zeros((3, 5)))).shape
      (3, 5)
    """
    return decode(x).astype(x.dtype) if isinstance(x, QuantizedArray) else x


def decode(x: QuantizedArray) -> jax.Array:
    """The array in fp32, the precision in which the law of idempotence holds."""
    codes = packing.unpack(x.codes, x.size, x.bits, x.axis)
    return affine.decode(codes, affine.Grid(x.scales, x.zeros), x.block, x.axis)


def add(x: QuantizedArray, update: jax.Array, noise: jax.Array | None) -> QuantizedArray:
    """``x + update``, stored like `x`, on its grid wherever the sum fits.

    A block keeps its grid as long as that covers it and is not more than twice too wide, and the
    sum is then taken in steps of the grid. So an update of zero changes no code, and stochastic
    rounding adds noise in proportion to the update.

    Args:
      x: What is stored.
      update: Of its shape.
      noise: `keys.rounding_noise` of its shape; None rounds to nearest.

    Returns:
      The sum, stored like `x`.
    """
    codes, change = (
        blocks.split(part.astype(jnp.float32), x.block, x.axis)
        for part in (packing.unpack(x.codes, x.size, x.bits, x.axis), update)
    )
    old = affine.Grid(x.scales, x.zeros)
    scale, zero = (jnp.expand_dims(part, x.axis) for part in old)
    total = (codes - zero.astype(jnp.float32)) * scale + change
    # Padding has code 0, which need not be the code of zero.
    total = blocks.split(blocks.join(total, x.size, x.axis), x.block, x.axis)
    bounds = affine.block_range(total, x.axis)
    keep = affine.fits(bounds, old, x.bits)
    fresh = affine.fit(bounds, x.bits, stochastic=noise is not None)
    position = jnp.where(
        jnp.expand_dims(keep, x.axis),
        codes + change * (1 / scale),
        affine.positions(total, fresh, x.axis),
    )
    if noise is None:
        new = affine.nearest(position, x.bits)
    else:
        new = affine.stochastic(position, x.bits, blocks.split(noise, x.block, x.axis))
    grid = affine.Grid(*(jnp.where(keep, a, b) for a, b in zip(old, fresh, strict=True)))
    return _assemble(new, grid, x.size, x.bits, x.block, x.dtype, x.axis)


def _assemble(
    split: jax.Array,
    grid: affine.Grid,
    size: int,
    bits: int,
    block: int,
    dtype: jax.typing.DTypeLike,
    axis: int,
) -> QuantizedArray:
    codes = packing.pack(blocks.join(split, size, axis), bits, axis)
    return QuantizedArray(codes, *grid, size, bits, block, jnp.dtype(dtype), axis)


def _check(x: Any, bits: int, block: int, axis: int) -> None:
    check_format(bits, block)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"only real floating arrays are quantized, got {x.dtype}.")
    if axis not in (-1, -2):
        raise ValueError(f"blocks run along axis -1 or -2, got {axis}.")
    if x.ndim < -axis or 0 in x.shape:
        raise ValueError(f"an array of shape {x.shape} has no blocks along axis {axis}.")


def check_format(bits: int, block: int) -> None:
    """Raises unless the codes have 8 or 4 bits and the block at least one entry."""
    if bits not in (4, 8):
        raise ValueError(f"`bits` is 8 or 4, got {bits!r}.")
    blocks.check_block(block)
