"""Every matrix once per period, a few on each step."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.refresh.base import MatrixSlots, RefreshPolicy, check_gap


class StaggeredState(NamedTuple):
    """Memory of `staggered`.

    Args:
      places: ``uint32[*batch]`` per leaf, the place of each matrix among all of them as a fraction,
        in units of 2⁻³². Kept, not derived: a slice of a stack of layers knows its own.
    """

    places: Any


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

    def init(self, treedef, slots):
        return StaggeredState(treedef.unflatten(map(_places, slots)))

    def decide(self, count, batches, memory, moves):
        del moves
        treedef: Any = jax.tree.structure(memory.places)
        phase = (count % self.gap).astype(jnp.uint32)
        due = [
            None if batch is None else jax.lax.mulhi(place, jnp.full_like(place, self.gap)) == phase
            for batch, place in zip(batches, treedef.flatten_up_to(memory.places), strict=True)
        ]
        return due, memory


def _places(slot: MatrixSlots | None) -> jax.Array:
    if slot is None:
        return jnp.zeros((), jnp.uint32)
    # Python integers are exact; rounded up, so that i·gap / N does not fall below an integer.
    count = int(np.prod(slot.batch_shape, dtype=np.int64))
    places = [-(-((slot.first + i) << 32) // slot.total) for i in range(count)]
    return jnp.asarray(np.asarray(places, np.uint32).reshape(slot.batch_shape))
