"""State of the lens."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from galore_jax.transforms.config import LowRankConfig


class RefreshState(NamedTuple):
    """Which matrices are refreshed next, and what the policy remembers.

    Args:
      due: ``bool[*batch]`` per leaf, decided at the end of the previous step.
      refreshes: ``int32[*batch]`` per leaf, how often each basis has been recomputed.
      overlap: ``float32[*batch]`` per leaf, share of the subspace before the last refresh that lies
        in the one after it; zero until there have been two refreshes.
      places: ``uint32[*batch]`` per leaf, where each matrix stands among all of them.
      memory: State of the policy.
    """

    due: optax.Updates
    refreshes: optax.Updates
    overlap: optax.Updates
    places: optax.Updates
    memory: Any


class LowRankState(NamedTuple):
    """State of `low_rank_projection`. Every tree has an array at every leaf of the parameters.

    Args:
      config: Static description of the lens (no arrays).
      count: int32 scalar, optimizer steps.
      projectors: Stored basis per leaf, ``[*batch, projected, rank]`` before the codec; a scalar
        zero where a leaf is not projected.
      refresh_state: Which matrices are due.
      inner_state: State of the inner transformation on the low-rank tree.
    """

    config: LowRankConfig
    count: jax.Array  # type: ignore[assignment]  # optax's name for it
    projectors: optax.Updates
    refresh_state: RefreshState
    inner_state: optax.OptState


class AccumulateState(NamedTuple):
    """State of `accumulate`. Every tree has an array at every leaf of the parameters.

    Args:
      mini_step: int32 scalar, micro-batches of the current window so far.
      sums: Of the gradients: ``[*batch, kept, rank]`` for projected leaves, full size for others.
      projectors: Stored bases of the window; a scalar zero where a leaf is not projected.
      moved: ``bool[*batch]`` per leaf, which of them are new in this window.
      opt_state: State of the transformation that runs once per window.
    """

    mini_step: jax.Array
    sums: optax.Updates
    projectors: optax.Updates
    moved: optax.Updates
    opt_state: optax.OptState
