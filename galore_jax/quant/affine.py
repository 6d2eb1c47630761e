"""Uniform grids: a block of numbers as unsigned codes, value = (code - zero) · scale.

The range of a block always contains zero, so that zero is exact, padding never matters, and a
block of one sign does not saturate. A grid is fitted in one of two ways:

  * for rounding to nearest, all 2ᵇ codes span the range, and its ends may lie up to half a step
    off the grid;
  * for stochastic rounding one code is kept in reserve, so that the whole range lies inside the
    grid wherever zero falls: at an end that sticks out, rounding would be biased.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.quant import blocks

# Below this a step would not be a normal number.
_SMALLEST_SCALE = np.float32(2.0**-126)
# A range may leave the grid by this share of a step before the zero point moves up for it.
_SLACK = 2.0**-9


class Grid(NamedTuple):
    """Per block: the step, fp32, and the code of zero, uint8. NaN where the block is not finite."""

    scale: jax.Array
    zero: jax.Array


class Range(NamedTuple):
    """Per block: least and greatest value, zero included."""

    low: jax.Array
    high: jax.Array


def block_range(split: jax.Array, axis: int) -> Range:
    """The range of every block of `blocks.split`."""
    return Range(
        jnp.minimum(jnp.min(split, axis), 0),
        jnp.maximum(jnp.max(split, axis), 0),
    )


def fit(bounds: Range, bits: int, *, stochastic: bool) -> Grid:
    """The grid of a block with such a range."""
    steps = _top(bits) - stochastic
    # In halves, because the difference of two large numbers may overflow.
    scale = _rounded((bounds.high / 2 - bounds.low / 2) / (steps / 2))
    scale = jnp.where(jnp.isfinite(scale), jnp.maximum(scale, _SMALLEST_SCALE), jnp.nan)
    below = -bounds.low / scale
    zero = jnp.ceil(below - _SLACK) if stochastic else jnp.round(below)
    return Grid(scale, jnp.where(jnp.isfinite(zero), zero, 0).astype(jnp.uint8))


def fits(bounds: Range, grid: Grid, bits: int) -> jax.Array:
    """True for a block that can keep its grid: it covers the range and is at most twice as wide."""
    zero = grid.zero.astype(jnp.float32)
    low, high = -zero * grid.scale, (_top(bits) - zero) * grid.scale
    covered = (low <= bounds.low) & (bounds.high <= high)
    return covered & (high / 2 - low / 2 <= bounds.high - bounds.low)


def positions(split: jax.Array, grid: Grid, axis: int) -> jax.Array:
    """Places of the entries of a block between the codes of its grid."""
    scale, zero = (jnp.expand_dims(part, axis) for part in grid)
    return split * (1 / scale) + zero.astype(jnp.float32)


def rounded(position: jax.Array, bits: int, noise: jax.Array | None) -> jax.Array:
    """Codes by rounding to nearest, half to even; with `noise`, uniform in [0, 1), stochastically.

    Stochastic rounding goes up with the probability of the fraction.
    """
    values = jnp.round(position)
    if noise is not None:
        # Not floor(position + noise): that sum would be rounded, and move what lies on a code.
        values = jnp.floor(position)
        values += (noise < position - values).astype(jnp.float32)
    return jnp.clip(values, 0, _top(bits)).astype(jnp.uint8)


def with_ends(
    codes: jax.Array, split: jax.Array, bounds: Range, grid: Grid, bits: int, axis: int
) -> jax.Array:
    """Codes rounded to nearest, with the outermost codes at the ends of the block's own range.

    Rounding errors could take them away in a tie. So the range of the decoded block is that of the
    grid, and quantizing again changes nothing.
    """
    low, high, scale = (jnp.expand_dims(part, axis) for part in (*bounds, grid.scale))
    spans = scale > _SMALLEST_SCALE  # otherwise the range is shorter than the grid
    codes = jnp.where(spans & (split == low) & (split < 0), jnp.uint8(0), codes)
    return jnp.where(spans & (split == high) & (split > 0), jnp.uint8(_top(bits)), codes)


def decode(codes: jax.Array, grid: Grid, block: int, axis: int) -> jax.Array:
    """Codes in the shape of the array -> fp32."""
    size = codes.shape[axis]
    scale, zero = (blocks.spread(part, size, block, axis) for part in grid)
    return (codes.astype(jnp.float32) - zero.astype(jnp.float32)) * scale


def _top(bits: int) -> int:
    return 2**bits - 1


def _rounded(scale: jax.Array) -> jax.Array:
    """To 21 significant bits: coarser than rounding errors, so that fitting again gives the same.

    Moves the far end of a range by at most 2⁻¹³ of a step.
    """
    word = jax.lax.bitcast_convert_type(scale, jnp.uint32)
    return jax.lax.bitcast_convert_type((word + np.uint32(4)) & np.uint32(0xFFFFFFF8), jnp.float32)
