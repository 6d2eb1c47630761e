"""The contract of a refresh policy."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, NamedTuple

import jax


class Matrices(NamedTuple):
    """Equal matrices, before the first step: the same weight of several layers, or a lone one.

    Their flags and numbers lie in one array, ``[*matrices]``: ``[leaves, *batch]``, or ``[*batch]``
    for a lone leaf.

    Args:
      phase: ``uint32[*matrices]``, the place of each matrix among all matrices of the model, a
        fraction in units of 2⁻³²: policies that spread their work can give each a time of its own.
      low_rank: Per leaf the shape and dtype of R, ``[*batch, kept, rank]``.
    """

    phase: jax.Array
    low_rank: tuple[jax.ShapeDtypeStruct, ...]


class Observation(NamedTuple):
    """Equal matrices, after a step.

    Args:
      moved: ``bool[*matrices]``, which bases were recomputed in it.
      compared: ``bool[*matrices]``, those of them whose `similarity` means something: not the first
        ones of their matrices.
      refreshes: ``int32[*matrices]``, bases that each matrix has had, this step's included.
      similarity: ``float32[*matrices]``, the policy's `similarity` of the bases before and after;
        zero where nothing moved.
      low_rank: Per leaf R ``[*batch, kept, rank]``, projected onto the bases of this step.
    """

    moved: jax.Array
    compared: jax.Array
    refreshes: jax.Array
    similarity: jax.Array
    low_rank: tuple[jax.Array, ...]


class RefreshPolicy(abc.ABC):
    """Decides, at the end of a step, which matrices are refreshed at the start of the next one.

    Policies are frozen dataclasses. They are asked about all matrices of one kind at a time. Every
    matrix is due at count 0, whatever the policy, and a matrix whose refresh failed (a gradient
    that is not finite, or zero) stays due: both are the lens' business.
    """

    # Measure of two bases ``[projected, rank]``, taken during a refresh; None for the share of one
    # subspace that lies in the other.
    similarity: ClassVar[Any] = None

    @property
    def compares_columns(self) -> bool:
        """Whether column i of a basis has to mean the same thing before and after a refresh."""
        return False

    def init(self, matrices: Matrices) -> Any:
        """Memory for matrices of one kind.

        An array is sharded as one number per matrix; a tuple of one array per leaf, each of the
        shape of its R, as a low-rank moment.

        Args:
          matrices: Which ones.

        Returns:
          () or any pytree of arrays, batch axes leading (behind that of the leaves).
        """
        del matrices
        return ()

    def current_gap(self, memory: Any) -> jax.Array | int:
        """Steps between two refreshes of each matrix as things are now, ``int32[*matrices]``.

        Args:
          memory: What `init` or `decide` returned.

        Returns:
          One number for all, or one for each; zero where nobody can say.
        """
        del memory
        return 0

    @abc.abstractmethod
    def decide(self, count: jax.Array, memory: Any, seen: Observation) -> tuple[jax.Array, Any]:
        """The matrices that are due at `count`.

        Args:
          count: int32 scalar, the count of the step that comes next.
          memory: What `init` or the previous call returned. Both it and `seen` may be slices of one
            layer, with batch axes of size one.
          seen: What happened in this step.

        Returns:
          ``bool[*matrices]`` or a scalar for all of them, and the new memory.
        """
