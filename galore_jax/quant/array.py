"""An array stored as blockwise integer codes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.checks import check_count
from galore_jax.keys import leaf_key, rounding_noise
from galore_jax.meshes import with_auto_axes
from galore_jax.quant import affine, blocks, packing
from galore_jax.quant.weight import Weight
from galore_jax.serialization import Known, register


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray(Weight, metaclass=Known):
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
      length: n, of the last axis.
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
    length: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True}, default=-1)

    # numpy must not take over `array * quantized`.
    __array_priority__ = 100

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self.axis] = self.length
        return tuple(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(self))

    def astype(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The decoded array in another dtype; saturates where that one ends earlier than fp32."""
        wide, largest = decode(self), float(jnp.finfo(dtype).max)
        if largest < float(jnp.finfo(jnp.float32).max):
            wide = jnp.clip(wide, -largest, largest)  # an outer code may lie beyond the range
        return wide.astype(dtype)

    def decoded(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The decoded array as a constant of a product."""
        return jax.lax.stop_gradient(dequantize(self)).astype(dtype)

    def __jax_array__(self) -> jax.Array:
        return dequantize(self)

    def __mul__(self, other: Any) -> jax.Array:
        return dequantize(self) * other

    def __rmul__(self, other: Any) -> jax.Array:
        return other * dequantize(self)

    def __repr__(self) -> str:
        shape = self.shape if hasattr(self.codes, "shape") else None
        return (
            f"QuantizedArray(shape={shape}, bits={self.bits}, "
            f"block={self.block}, dtype={jnp.dtype(self.dtype).name})"
        )


register(QuantizedArray, "codes", "scales", "zeros")


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
    block = check_format(bits, block)
    _check(x, axis)
    split = blocks.split(x.astype(jnp.float32), block, axis)
    bounds = affine.block_range(split, axis)
    grid = affine.fit(bounds, bits, stochastic=key is not None)
    position = affine.positions(split, grid, axis)
    noise = None
    if key is not None:
        noise = blocks.split(rounding_noise(leaf_key(key, ""), x.shape), block, axis)
    codes = affine.rounded(position, bits, noise)
    if noise is None:
        codes = affine.with_ends(codes, split, bounds, grid, bits, axis)
    size = x.shape[axis]
    packed = packing.pack(blocks.join(codes, size, axis), bits, axis)
    return QuantizedArray(packed, *grid, size, bits, block, jnp.dtype(x.dtype), axis)


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
    return x.astype(x.dtype) if isinstance(x, QuantizedArray) else x


def decode(x: QuantizedArray) -> jax.Array:
    """The array in fp32, the precision in which the law of idempotence holds."""
    return with_auto_axes(_decode, x, like=x.codes)


def _decode(x: QuantizedArray) -> jax.Array:
    codes = packing.unpack(x.codes, x.length, x.bits, x.axis)
    return affine.decode(codes, affine.Grid(x.scales, x.zeros), x.block, x.axis)


def add(x: QuantizedArray, update: jax.Array, noise: jax.Array | None) -> QuantizedArray:
    """``x + update``, stored like `x`, on its grid wherever the sum fits.

    A block keeps its grid as long as that covers it and is not more than twice too wide, and the
    sum is then taken in steps of the grid. So a block whose updates are all zero keeps its codes,
    and stochastic rounding adds noise in proportion to the update.

    Args:
      x: What is stored.
      update: Of its shape.
      noise: `keys.rounding_noise` of its shape; None rounds to nearest.
    """
    return with_auto_axes(_add, x, update, noise, like=x)


def _add(x: QuantizedArray, update: jax.Array, noise: jax.Array | None) -> QuantizedArray:
    def per_entry(per_block: jax.Array) -> jax.Array:
        return blocks.spread(per_block, x.length, x.block, x.axis)

    codes = packing.unpack(x.codes, x.length, x.bits, x.axis)
    update = update.astype(jnp.float32)
    old = affine.Grid(x.scales, x.zeros)
    before = affine.decode(codes, old, x.block, x.axis)
    bounds = affine.block_range(blocks.split(before + update, x.block, x.axis), x.axis)
    still = jnp.all(blocks.split(update, x.block, x.axis) == 0, x.axis)
    keep = still | affine.fits(bounds, old, x.bits)
    fresh = affine.fit(bounds, x.bits, stochastic=noise is not None)
    grid = affine.Grid(*(jnp.where(keep, a, b) for a, b in zip(old, fresh, strict=True)))

    inverse = per_entry(1 / grid.scale)
    position = jnp.where(
        per_entry(keep),
        codes.astype(jnp.float32) + update * inverse,  # exact where nothing changes
        (before + update) * inverse + per_entry(grid.zero).astype(jnp.float32),
    )
    packed = packing.pack(affine.rounded(position, x.bits, noise), x.bits, x.axis)
    return dataclasses.replace(x, codes=packed, scales=grid.scale, zeros=grid.zero)


def _check(x: Any, axis: int) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"only real floating arrays are quantized, got {x.dtype}.")
    if axis not in (-1, -2):
        raise ValueError(f"blocks run along axis -1 or -2, got {axis}.")
    if x.ndim < -axis or 0 in x.shape:
        raise ValueError(f"an array of shape {x.shape} has no blocks along axis {axis}.")


def check_format(bits: int, block: int) -> int:
    """The block as a Python integer; raises unless codes of so many bits, 8 or 4, are known."""
    if bits not in (4, 8):
        raise ValueError(f"`bits` is 8 or 4, got {bits!r}.")
    return check_count("block", block)
