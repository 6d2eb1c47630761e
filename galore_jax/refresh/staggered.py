"""One share of the matrices per step, so that no step is slow."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from galore_jax.refresh.base import MatrixSlots, RefreshPolicy, check_gap


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

    def decide(self, count, slots, memory, moves):
        del moves
        phase = count % self.gap
        return [slot and jnp.asarray(self._phases(slot)) == phase for slot in slots], memory

    def _phases(self, slot: MatrixSlots) -> np.ndarray:
        # Python integers: the product would overflow int32 for long gaps and many matrices.
        count = int(np.prod(slot.batch_shape, dtype=np.int64))
        phases = [(slot.first + i) * self.gap // slot.total for i in range(count)]
        return np.asarray(phases, np.int32).reshape(slot.batch_shape)
