"""Methods that find an orthonormal basis from a gradient."""

from galore_jax.projectors.base import Projector
from galore_jax.projectors.exact import gram_eigh, svd
from galore_jax.projectors.operator import (
    HIGHEST,
    MatrixOperator,
    dense_operator,
    mean_operator,
    working_dtype,
)
from galore_jax.projectors.random import random_orthonormal
from galore_jax.projectors.range_finder import (
    orthonormalize,
    randomized_svd,
    subspace_iteration,
)

__all__ = [
    "HIGHEST",
    "MatrixOperator",
    "Projector",
    "dense_operator",
    "gram_eigh",
    "mean_operator",
    "orthonormalize",
    "random_orthonormal",
    "randomized_svd",
    "subspace_iteration",
    "svd",
    "working_dtype",
]
