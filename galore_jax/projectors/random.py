"""A basis that does not look at the gradient."""

from __future__ import annotations

import dataclasses

import jax

from galore_jax.projectors.base import Projector
from galore_jax.projectors.operator import MatrixOperator
from galore_jax.projectors.range_finder import orthonormalize


@dataclasses.dataclass(frozen=True)
class random_orthonormal(Projector):
    """A uniformly random subspace: an orthonormalized Gaussian matrix.

    Costs no product with the gradient and explores every direction in turn (GoLore's late phase).

    Example:
      >>> import galore_jax as gj
      >>> gj.projectors.random_orthonormal()
      random_orthonormal()

    References:
      He et al., "Subspace Optimization for Large Language Models with Convergence Guarantees", 2024
      (https://arxiv.org/abs/2410.11289).
    """

    def basis(self, gradient: MatrixOperator, rank, *, previous, refreshes, key):
        del refreshes
        shape = (gradient.shape[1], rank)
        columns = jax.random.normal(key, shape, gradient.dtype)
        return orthonormalize(columns, fill=previous.astype(gradient.dtype))
