"""The contract of a transport."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax


@dataclasses.dataclass(frozen=True)
class BasisMove:
    """The change of one leaf's bases in one step.

    Args:
      old: ``[*batch, projected, rank]`` before the step.
      new: ``[*batch, projected, rank]`` after it; equal to `old` where nothing moved.
      moved: ``bool[*batch]``.
    """

    old: jax.Array
    new: jax.Array
    moved: jax.Array


class Transport:
    """Two places where a refresh may touch what was there before. Frozen dataclasses.

    `turn` may choose another basis of the same new subspace; `carry` may rewrite the inner state.
    """

    # Moments are left where they are although columns may change meaning.
    needs_canonical_columns: ClassVar[bool] = False

    def turn(self, new: jax.Array, old: jax.Array) -> jax.Array:
        """Of all bases ``[projected, rank]`` of the span of `new`, the one to use after `old`."""
        del old
        return new

    def check(self, inner_state: Any, treedef: Any) -> None:
        """Raises if the inner state cannot be carried. Called once, in `init`."""

    def carry(self, inner_state: Any, treedef: Any, moves: list[BasisMove | None]) -> Any:
        """The inner state in the new coordinates.

        Args:
          inner_state: State of the inner transformation.
          treedef: Structure of the parameters.
          moves: One entry per leaf; None where a leaf is not projected.
        """
        del treedef, moves
        return inner_state
