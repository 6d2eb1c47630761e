"""States of the lens and of a window of micro-batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from galore_jax.transforms.config import LowRankConfig


def check_state(whose: str, state: Any, kind: type) -> None:
    """Raises unless the state is of a kind.

    Raises:
      TypeError: It is the state of something else, or none at all.
    """
    if not isinstance(state, kind):
        raise TypeError(
            f"the state of {whose} is of type {kind.__name__}, got {type(state).__name__}: it is "
            "the state of another optimizer. Make one with init."
        )


class RefreshState(NamedTuple):
    """Flags and counts of all matrices, and the memory of the policy.

    Matrices of one kind, the same weight of several layers or a lone one, share an array, so that
    a step does not handle hundreds of single flags: ``[leaves, *batch]``, or ``[*batch]`` for a
    lone leaf. Each field has one entry per kind, by its name.

    Args:
      due: Bool, matrices that the next step refreshes, decided at the end of the previous one.
      refreshes: int32, how often each basis has been recomputed.
      overlap: float32, share of the subspace before the last refresh that lies in the one after it;
        zero until there have been two refreshes.
      memory: What the policy remembers.
    """

    due: dict[str, jax.Array]
    refreshes: dict[str, jax.Array]
    overlap: dict[str, jax.Array]
    memory: dict[str, Any]


class LowRankState(NamedTuple):
    """State of `low_rank_projection`.

    Args:
      config: Static description of the lens (no arrays).
      count: int32 scalar, optimizer steps.
      projectors: Stored basis per leaf, ``[*batch, projected, rank]`` before the codec; a scalar
        zero where a leaf is not projected.
      refresh_state: Which matrices are due.
      inner_state: State of the inner transformation on the low-rank tree.
      recovery_state: Memory of the recovery per leaf; () if it keeps none.
    """

    config: LowRankConfig
    count: jax.Array  # type: ignore[assignment]  # optax's name for it
    projectors: optax.Updates
    refresh_state: RefreshState
    inner_state: optax.OptState
    recovery_state: Any


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


def low_rank_states(opt_state: Any) -> list[LowRankState]:
    """All states of `low_rank_projection` in an optimizer state, in order."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, LowRankState))
    return [node for node in nodes if isinstance(node, LowRankState)]
