"""The contract of a refresh policy."""

from __future__ import annotations

import abc
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.basis import BasisMove


def places_of(batches: list[tuple[int, ...] | None]) -> list[jax.Array | None]:
    """Spreads the matrices of all leaves evenly, for policies that give each a time of its own.

    Args:
      batches: Shape of the batch axes of every leaf; None where a leaf is not projected.

    Returns:
      ``uint32[*batch]`` per leaf: the place of each matrix among all of them, a fraction in units
      of 2⁻³². It is kept in the state, so that a slice of a stack of layers knows its own.
    """
    sizes = [0 if batch is None else math.prod(batch) for batch in batches]
    total, first = sum(sizes), itertools.accumulate(sizes, initial=0)

    def places(batch: tuple[int, ...], start: int, size: int) -> jax.Array:
        # Rounded up, so that the share of a gap never falls below an integer.
        fractions = [-(-(number << 32) // total) for number in range(start, start + size)]
        return jnp.asarray(np.asarray(fractions, np.uint32).reshape(batch))

    return [
        None if batch is None else places(batch, start, size)
        for batch, start, size in zip(batches, first, sizes, strict=False)
    ]


class RefreshPolicy(abc.ABC):
    """Decides, at the end of a step, which matrices are refreshed at the start of the next one.

    Policies are frozen dataclasses. Every matrix is due at count 0, whatever the policy, and a
    matrix whose refresh failed (a gradient that is not finite, or zero) stays due: both are the
    lens' business.
    """

    @property
    def compares_columns(self) -> bool:
        """Whether column i of a basis has to mean the same thing before and after a refresh."""
        return False

    def init(self, treedef: Any, places: list[jax.Array | None]) -> Any:
        """Memory of the policy: () or a NamedTuple of trees with one array per leaf.

        Args:
          treedef: Structure of the parameters, to unflatten one array per leaf.
          places: See `places_of`.
        """
        del treedef, places
        return ()

    def gaps(self, places: list[jax.Array | None], memory: Any) -> list[jax.Array | None]:
        """Steps between two refreshes of each matrix, as things are now.

        Args:
          places: See `places_of`.
          memory: What `init` or `decide` returned.

        Returns:
          ``int32[*batch]`` per projected leaf (None elsewhere); zero where nobody can say, which is
          what a policy without a gap inherits.
        """
        del memory
        return same_gap(0, places)

    @abc.abstractmethod
    def decide(
        self,
        count: jax.Array,
        places: list[jax.Array | None],
        memory: Any,
        moves: list[BasisMove | None],
    ) -> tuple[list[jax.Array | None], Any]:
        """Which matrices are due at `count`.

        Args:
          count: int32 scalar, the count of the step that comes next.
          places: See `places_of`. The leaves may be slices of those that `init` saw, and `memory`
            with them.
          memory: What `init` or the previous call returned.
          moves: One entry per projected leaf: how its bases moved in this step.

        Returns:
          ``bool[*batch]`` per projected leaf (None elsewhere), and the new memory.
        """


def same_gap(gap: int, places: list[jax.Array | None]) -> list[jax.Array | None]:
    """One gap for all matrices."""
    return [None if place is None else jnp.full(place.shape, gap, jnp.int32) for place in places]


def check_gap(gap: Any) -> None:
    """Raises unless `gap` is an integer of at least one."""
    if isinstance(gap, bool) or not isinstance(gap, int):
        hint = (
            " Under optax.inject_hyperparams pass static_args=galore_jax.STATIC_ARGS."
            if isinstance(gap, jax.Array)
            else ""
        )
        raise TypeError(f"a refresh gap is an integer number of steps, got {gap!r}.{hint}")
    if gap < 1:
        raise ValueError(f"a refresh gap is at least one step, got {gap}.")
