"""The contract of a refresh policy."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax

from galore_jax.basis import BasisMove


@dataclasses.dataclass(frozen=True)
class MatrixSlots:
    """The matrices of one projected leaf, within the enumeration of all matrices of a lens.

    Args:
      batch_shape: Shape of the leaf's batch axes; one matrix per entry.
      first: Number of the leaf's first matrix.
      total: Number of matrices of all leaves together.
    """

    batch_shape: tuple[int, ...]
    first: int
    total: int


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

    def init(self, treedef: Any, slots: list[MatrixSlots | None]) -> Any:
        """Memory of the policy: () or a NamedTuple of trees with one array per leaf.

        Args:
          treedef: Structure of the parameters, to unflatten one array per leaf.
          slots: One entry per leaf; None where a leaf is not projected.
        """
        del treedef, slots
        return ()

    @abc.abstractmethod
    def decide(
        self,
        count: jax.Array,
        batches: list[tuple[int, ...] | None],
        memory: Any,
        moves: list[BasisMove | None],
    ) -> tuple[list[jax.Array | None], Any]:
        """Which matrices are due at `count`.

        Args:
          count: int32 scalar, the count of the step that comes next.
          batches: Shape of the batch axes of every leaf; None where a leaf is not projected. The
            leaves may be slices of those that `init` saw, and `memory` with them.
          memory: What `init` or the previous call returned.
          moves: One entry per projected leaf: how its bases moved in this step.

        Returns:
          ``bool[*batch]`` per projected leaf (None elsewhere), and the new memory.
        """


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
