"""The contract of a recovery."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, NamedTuple

import jax

from galore_jax.views import LeafPlan, MatrixView


class Leaving(NamedTuple):
    """One leaf on its way out of the subspace.

    Args:
      view: Batch, kept and projected axes of the leaf.
      dtype: Its dtype.
      gradient: The gradient in the shape of the leaf, the mean over devices; None unless the
        recovery `needs_gradient`.
      basis: ``[*batch, projected, rank]`` P, that of this step.
      low_rank: ``[*batch, kept, rank]`` R = G·P, which entered the inner transformation.
      direction: ``[*batch, kept, rank]`` N, which came out of it.
      scale: α of this step.
    """

    view: MatrixView
    dtype: Any
    gradient: jax.Array | None
    basis: jax.Array
    low_rank: jax.Array
    direction: jax.Array
    scale: Any


class Recovery(abc.ABC):
    """Turns a direction in the subspace into the update of a leaf.

    The seam behind the lift, for what a basis leaves out of a gradient. One rule for residual and
    lift, because two could count the complement twice. Recoveries are frozen dataclasses.
    """

    # Reads the gradient at full size: no gradient may arrive projected.
    needs_gradient: ClassVar[bool] = False
    # Takes the columns for orthonormal.
    needs_orthonormal: ClassVar[bool] = False

    def first_memory(self, plan: LeafPlan) -> Any:
        """Memory of one leaf: a pytree of arrays with the batch axes in front, or ().

        Args:
          plan: The leaf; one that is not projected has nothing to recover.
        """
        del plan
        return ()

    @abc.abstractmethod
    def leave(self, leaving: Leaving, memory: Any) -> tuple[jax.Array, Any]:
        """The update in the shape and dtype of the leaf, and the new memory.

        Args:
          leaving: The leaf.
          memory: What `first_memory` or the previous call returned.
        """
