"""Every matrix once per period, a few on each step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.refresh.base import RefreshPolicy, check_gap, same_gap


@dataclasses.dataclass(frozen=True)
class staggered(RefreshPolicy):
    """Refreshes every matrix once per gap, spread evenly over the steps of the gap.

    All matrices are refreshed at count 0; after that, matrix i of N whenever
    ``count ≡ ⌊i·gap / N⌋ (mod gap)``: the same work as `every(gap)`, with at most ⌈N / gap⌉
    matrices in any one step.

    Args:
      gap: Steps between two refreshes of a matrix.

    Raises:
      ValueError: `gap` below one.
      TypeError: `gap` is not an integer.

    Example:
      >>> import galore_jax as gj
      >>> tx = gj.galore_adamw(1e-2, update_proj_gap=gj.refresh.staggered(200))
    """

    gap: int

    def __post_init__(self):
        check_gap(self.gap)

    def gaps(self, places, memory):
        del memory
        return same_gap(self.gap, places)

    def decide(self, count, places, memory, moves):
        del moves
        phase = (count % self.gap).astype(jnp.uint32)
        due = [None if place is None else _high_word(place, self.gap) == phase for place in places]
        return due, memory


def _high_word(x: jax.Array, factor: int) -> jax.Array:
    """The upper 32 bits of the product of two 32-bit numbers, from 16-bit halves."""
    # lax.mulhi is the same, but cannot be compiled for several devices (JAX 0.10.2).
    half, mask = np.uint32(16), np.uint32(0xFFFF)
    high, low = np.uint32(factor >> 16), np.uint32(factor & 0xFFFF)
    middle = (x >> half) * low + ((x & mask) * low >> half)
    rest = (x & mask) * high + (middle & mask)
    return (x >> half) * high + (middle >> half) + (rest >> half)
