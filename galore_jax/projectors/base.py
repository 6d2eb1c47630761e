"""The contract of a projector."""

from __future__ import annotations

import abc
from typing import ClassVar

import jax

from galore_jax.codecs import Codec, identity
from galore_jax.projectors.operator import MatrixOperator


class Projector(abc.ABC):
    """Finds a basis of (a good part of) the row space of one gradient matrix.

    Projectors are frozen dataclasses: static, hashable, comparable, printable.

    Laws, which the tests check for every one of them:
      * the columns are orthonormal, max|PᵀP − I| ≤ 1e-5 in fp32, for every finite input, a zero
        or rank-deficient one included, unless the projector says that they are not;
      * scaling the gradient by a positive number does not change the subspace;
      * same gradient, previous basis and key, same bits.
    """

    # The columns are orthonormal: overlaps need no weights, and moments can be rotated.
    orthonormal: ClassVar[bool] = True
    # Column i means the same direction from one refresh to the next (up to drift), so that
    # moments may stay where they are. Singular vectors in order do; a sketch does not.
    canonical_columns: ClassVar[bool] = False
    # Needs the gradient matrix itself, not only products with it.
    forms_gradient: ClassVar[bool] = False

    @property
    def default_codec(self) -> Codec:
        """Storage of the bases, where the user names none."""
        return identity()

    @abc.abstractmethod
    def basis(
        self,
        gradient: MatrixOperator,
        rank: int,
        *,
        previous: jax.Array,
        refreshes: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        """The new basis.

        Args:
          gradient: G, ``[kept, projected]``.
          rank: Number of columns, below `projected` and at most `kept`.
          previous: ``[projected, rank]``, the basis in use: columns of about unit norm, orthonormal
            up to what storage, or another projector before this one, made of them.
          refreshes: int32 scalar, bases that this matrix has had; zero while `previous` is the
            initial one, which means nothing.
          key: ``uint32[2]``, randomness of this matrix at this step; see `galore_jax.keys`, or
            use it as a raw key of `jax.random`.

        Returns:
          ``[projected, rank]`` in the working precision of `gradient`.
        """
