"""The contract of a transport."""

from __future__ import annotations

from typing import Any, ClassVar

import jax

from galore_jax.basis import BasisMove


class Transport:
    """Two places where a refresh may touch what was there before. Frozen dataclasses.

    `turn` may choose another basis of the same new subspace; `carry` may rewrite the inner state.
    """

    # Moments are left where they are although columns may change meaning.
    needs_canonical_columns: ClassVar[bool] = False
    # The columns that the projector found stay what and where they are.
    keeps_columns: ClassVar[bool] = True

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
