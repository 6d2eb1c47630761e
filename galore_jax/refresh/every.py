"""All matrices together, once per period."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from galore_jax.refresh.base import RefreshPolicy, check_gap, same_gap


@dataclasses.dataclass(frozen=True)
class every(RefreshPolicy):
    """Refreshes every matrix at counts 0, gap, 2·gap, … (the paper).

    Args:
      gap: Steps between two refreshes.

    Raises:
      ValueError: `gap` below one.
      TypeError: `gap` is not an integer.

    Example:
      >>> import galore_jax as gj
      >>> gj.galore_adamw(1e-2, update_proj_gap=gj.refresh.every(200)).init({})[0].config.refresh
      every(gap=200)
    """

    gap: int

    def __post_init__(self):
        check_gap(self.gap)

    def gaps(self, places, memory):
        del memory
        return same_gap(self.gap, places)

    def decide(self, count, places, memory, moves):
        del moves
        due = count % self.gap == 0
        return [
            None if place is None else jnp.broadcast_to(due, place.shape) for place in places
        ], memory


def as_policy(refresh: Any) -> RefreshPolicy:
    """A policy as given, or `every(n)` for an integer n."""
    return refresh if isinstance(refresh, RefreshPolicy) else every(refresh)
