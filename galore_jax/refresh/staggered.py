"""Every matrix once per period, a few on each step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from galore_jax.refresh.base import RefreshPolicy, check_gap


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

    def decide(self, count, places, memory, moves):
        del moves
        phase = (count % self.gap).astype(jnp.uint32)
        due = [
            None if place is None else jax.lax.mulhi(place, jnp.full_like(place, self.gap)) == phase
            for place in places
        ]
        return due, memory
