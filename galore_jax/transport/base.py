"""The contract of a transport."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class BasisChange:
    """The change of one leaf's bases in one step.

    Args:
      old: ``[*batch, projected, rank]`` before the step.
      new: ``[*batch, projected, rank]`` after it; equal to `old` where nothing moved.
      moved: ``bool[*batch]``.
      was_initial: ``bool[*batch]``, True where `old` is the initial basis, which means nothing.
    """

    old: jax.Array
    new: jax.Array
    moved: jax.Array
    was_initial: jax.Array


class Transport:
    """Two places where a refresh may touch what was there before. Frozen dataclasses.

    `turn` may choose another basis of the same new subspace; `carry` may rewrite the inner state.
    """

    # Moments are left where they are although columns may change meaning.
    needs_canonical_columns: ClassVar[bool] = False
    # Takes the columns for orthonormal.
    needs_orthonormal: ClassVar[bool] = False
    # The columns that the projector found stay what and where they are.
    keeps_columns: ClassVar[bool] = True
    # `carry` rewrites the inner state: it then takes part in the conditional around a refresh.
    carries_state: ClassVar[bool] = False

    def turn(self, new: jax.Array, old: jax.Array) -> jax.Array:
        """Basis to use after `old`, of all those ``[projected, rank]`` of the span of `new`."""
        del old
        return new

    def check(self, inner_state: Any, treedef: Any) -> None:
        """Raises if the inner state cannot be carried. Called once, in `init`."""

    def carry(self, inner_state: Any, treedef: Any, changes: list[BasisChange | None]) -> Any:
        """The inner state in the new coordinates, on a step that refreshes something.

        Args:
          inner_state: State of the inner transformation.
          treedef: Structure of the parameters.
          changes: One entry per leaf; None where a leaf is not projected.
        """
        del treedef, changes
        return inner_state
