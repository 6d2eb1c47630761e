"""Bases from a full factorization: the exact dominant subspace."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from galore_jax.projectors.base import Projector
from galore_jax.projectors.operator import HIGHEST, MatrixOperator
from galore_jax.projectors.range_finder import orthonormalize


@dataclasses.dataclass(frozen=True)
class svd(Projector):
    """The leading singular vectors, by a full SVD of each matrix (the GaLore paper).

    G = U·Σ·Vᵀ in [reduction, output] orientation; P is U[:, :r] when the reduction axis is
    projected and V[:, :r] when the output axis is. Gathers a sharded gradient.

    Args:
      signs: "lapack" keeps the signs the SVD returns (the same numbers as `optax.contrib.galore`);
        "positive" makes the largest entry of every column positive.

    Raises:
      ValueError: Unknown `signs`.

    Example:
      >>> import galore_jax as gj
      >>> exact = {"projector": gj.projectors.svd(), "transport": gj.transport.keep()}
      >>> tx = gj.galore_adamw(1e-2, rank=8, **exact)

    References:
      Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024,
      section 4 (https://arxiv.org/abs/2403.03507).
    """

    signs: Literal["lapack", "positive"] = "lapack"
    canonical_columns = True
    forms_gradient = True

    def __post_init__(self):
        if self.signs not in ("lapack", "positive"):
            raise ValueError(f"`signs` is 'lapack' or 'positive', got {self.signs!r}.")

    def basis(self, gradient: MatrixOperator, rank, *, previous, refreshes, key):
        del previous, refreshes, key
        matrix = _finite(gradient)
        if gradient.projects_input:
            vectors = jnp.linalg.svd(matrix.T, full_matrices=False)[0][:, :rank]
        else:
            vectors = jnp.linalg.svd(matrix, full_matrices=False)[2][:rank].T
        return vectors if self.signs == "lapack" else _positive(vectors)


@dataclasses.dataclass(frozen=True)
class gram_eigh(Projector):
    """The leading singular vectors, from the eigenvectors of the smaller Gram matrix.

    P spans the leading eigenvectors of GᵀG (or is Gᵀ·U orthonormalized, with U those of G·Gᵀ, when
    that is smaller). As exact as the SVD for every direction that carries energy, and 2 to 5 times
    faster on CPU. The largest entry of every column is positive.

    Example:
      >>> import galore_jax as gj
      >>> gj.projectors.gram_eigh()
      gram_eigh()
    """

    canonical_columns = True
    forms_gradient = True

    def basis(self, gradient: MatrixOperator, rank, *, previous, refreshes, key):
        del refreshes, key
        kept, projected = gradient.shape
        matrix = _finite(gradient.normalized())
        short = matrix.T if projected <= kept else matrix
        _, vectors = jnp.linalg.eigh(jnp.matmul(short, short.T, precision=HIGHEST))
        leading = vectors[:, ::-1][:, :rank]
        if projected > kept:
            lifted = jnp.matmul(matrix.T, leading, precision=HIGHEST)
            leading = orthonormalize(lifted, fill=previous.astype(lifted.dtype))
        return _positive(leading)


def _finite(gradient: MatrixOperator) -> jax.Array:
    """The matrix, or zeros if it is not finite: LAPACK is not safe with NaN and inf.

    Whoever asked for the basis drops it then.
    """
    if gradient.dense is None:
        raise ValueError(
            "this projector needs the gradient matrix itself, which is not formed here. Use "
            "randomized_svd, subspace_iteration or random_orthonormal."
        )
    return jnp.where(jnp.isfinite(gradient.magnitude), gradient.dense(), 0)


def _positive(vectors: jax.Array) -> jax.Array:
    """Flips every column so that its entry of largest magnitude is positive."""
    index = jnp.argmax(jnp.abs(vectors), axis=0, keepdims=True)
    return vectors * jnp.where(jnp.take_along_axis(vectors, index, axis=0) < 0, -1, 1)
