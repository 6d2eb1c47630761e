"""Every matrix once per period, a few on each step."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.checks import check_count
from galore_jax.refresh.base import RefreshPolicy


@dataclasses.dataclass(frozen=True)
class staggered(RefreshPolicy):
    """Refreshes every matrix once per gap, spread evenly over the steps of the gap.

    All matrices are refreshed at count 0; after that, matrix i of N whenever
    ``count ≡ ⌊i·gap / N⌋ (mod gap)``: the same work as `every(gap)`, with at most ⌈N / gap⌉
    matrices in any one step.

    Args:
      gap: Steps between two refreshes of a matrix.

    Raises:
      ValueError: `gap` below one, or beyond int32.
      TypeError: `gap` is not an integer.

    Example:
      >>> import galore_jax as gj
      >>> tx = gj.galore_adamw(1e-2, update_proj_gap=gj.refresh.staggered(200))
    """

    gap: int

    def __post_init__(self):
        object.__setattr__(self, "gap", check_count("gap", self.gap))

    def init(self, matrices):
        return matrices.phase

    def current_gap(self, memory):
        del memory
        return self.gap

    def decide(self, count, memory, seen):
        del seen
        return _high_word(memory, self.gap) == (count % self.gap).astype(jnp.uint32), memory


def phases(batches: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Places of all matrices, spread evenly; see `Matrices`.

    Args:
      batches: Shape of the batch axes of every projected leaf.

    Returns:
      ``uint32[*batch]`` per leaf.
    """
    sizes = [math.prod(batch) for batch in batches]
    total, first = sum(sizes), itertools.accumulate(sizes, initial=0)

    def places(batch: tuple[int, ...], start: int, size: int) -> np.ndarray:
        # Rounded up, so that the share of a gap never falls below an integer.
        fractions = [-(-(number << 32) // total) for number in range(start, start + size)]
        return np.asarray(fractions, np.uint32).reshape(batch)

    return [places(*one) for one in zip(batches, first, sizes, strict=False)]


def _high_word(x: jax.Array, factor: int) -> jax.Array:
    """The upper 32 bits of the product of two 32-bit numbers, from 16-bit halves."""
    # lax.mulhi is the same, but cannot be compiled for several devices (JAX 0.10.2).
    half, mask = np.uint32(16), np.uint32(0xFFFF)
    high, low = np.uint32(factor >> 16), np.uint32(factor & 0xFFFF)
    middle = (x >> half) * low + ((x & mask) * low >> half)
    rest = (x & mask) * high + (middle & mask)
    return (x >> half) * high + (middle >> half) + (rest >> half)
