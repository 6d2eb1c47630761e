"""The contract of a projector."""

from __future__ import annotations

import abc
from typing import ClassVar

import jax

from galore_jax.projectors.operator import MatrixOperator


class Projector(abc.ABC):
    """Finds an orthonormal basis of (a good part of) the row space of one gradient matrix.

    Projectors are frozen dataclasses: static, hashable, comparable, printable.

    Laws, which the tests check for every one of them:
      * the columns are orthonormal, max|PᵀP − I| ≤ 1e-5 in fp32, for every finite input, a zero
        or rank-deficient one included;
      * scaling the gradient by a positive number does not change the subspace;
      * same gradient, previous basis and key, same bits.
    """

    # Column i means the same direction from one refresh to the next (up to drift), so that
    # moments may stay where they are. Singular vectors in order do; a sketch does not.
    canonical_columns: ClassVar[bool] = False
    # Needs the gradient matrix itself, not only products with it.
    forms_gradient: ClassVar[bool] = False

    @abc.abstractmethod
    def basis(
        self,
        gradient: MatrixOperator,
        rank: int,
        *,
        previous: jax.Array,
        cold: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        """The new basis.

        Args:
          gradient: G, ``[kept, projected]``.
          rank: Number of columns, below `projected` and at most `kept`.
          previous: ``[projected, rank]``, the basis in use, orthonormal.
          cold: Scalar bool; True while `previous` is still the initial one and means nothing.
          key: ``uint32[2]``, randomness of this matrix at this step; see `galore_jax.keys`, or
            use it as a raw key of `jax.random`.

        Returns:
          ``[projected, rank]`` in the working precision of `gradient`.
        """
