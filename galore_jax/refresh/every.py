"""All matrices together, once per period."""

from __future__ import annotations

import dataclasses
from typing import Any

from galore_jax.checks import check_count
from galore_jax.refresh.base import RefreshPolicy


@dataclasses.dataclass(frozen=True)
class every(RefreshPolicy):
    """Refreshes every matrix at counts 0, gap, 2·gap, … (the paper).

    Args:
      gap: Steps between two refreshes.

    Raises:
      ValueError: `gap` below one, or beyond int32.
      TypeError: `gap` is not an integer.

    Example:
      >>> import galore_jax as gj
      >>> gj.galore_adamw(1e-2, update_proj_gap=gj.refresh.every(200)).init({})[0].config.refresh
      every(gap=200)
    """

    gap: int

    def __post_init__(self):
        object.__setattr__(self, "gap", check_count("gap", self.gap))

    def current_gap(self, memory):
        del memory
        return self.gap

    def decide(self, count, memory, seen):
        del seen
        return count % self.gap == 0, memory


def as_policy(refresh: Any) -> RefreshPolicy:
    """A policy as given, or `every(n)` for an integer n."""
    return refresh if isinstance(refresh, RefreshPolicy) else every(refresh)
