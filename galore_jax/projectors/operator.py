"""A gradient matrix known by its products, so that a basis can be found without forming it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from galore_jax import collectives
from galore_jax.views import MatrixView

HIGHEST = jax.lax.Precision.HIGHEST

Product = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class MatrixOperator:
    """G ``[kept, projected]`` by its two products.

    Args:
      shape: ``(kept, projected)``.
      dtype: Working precision of the products.
      matmul: ``[projected, k] -> [kept, k]``, G·V.
      rmatmul: ``[kept, k] -> [projected, k]``, Gᵀ·U.
      largest: Computes the `magnitude`.
      projects_input: Whether the projected axis is the reduction axis of the leaf.
      dense: Forms the matrix ``[kept, projected]``; None where it must never be formed.
    """

    shape: tuple[int, int]
    dtype: jax.typing.DTypeLike
    matmul: Product
    rmatmul: Product
    largest: Callable[[], jax.Array]
    projects_input: bool
    dense: Callable[[], jax.Array] | None = None

    @functools.cached_property
    def magnitude(self) -> jax.Array:
        """Scalar, the largest absolute entry of G; NaN or inf if G has one."""
        return self.largest()

    @property
    def is_usable(self) -> jax.Array:
        """True if there is a direction to find: G is finite and not zero."""
        return jnp.isfinite(self.magnitude) & (self.magnitude > 0)

    def normalized(self) -> MatrixOperator:
        """The same matrix scaled so that its largest entry is about one, which moves no subspace.

        Keeps GᵀG inside the range of fp32 for gradients anywhere between 1e-30 and 1e30.
        """
        # Half of the scaling before the product and half after it: neither overflows.
        dense, half = self.dense, jax.lax.rsqrt(jnp.where(self.is_usable, self.magnitude, 1))
        return dataclasses.replace(
            self,
            matmul=lambda v: self.matmul(v * half) * half,
            rmatmul=lambda u: self.rmatmul(u * half) * half,
            largest=lambda: jnp.where(self.is_usable, 1, self.magnitude),
            dense=None if dense is None else lambda: dense() * half * half,
        )


def working_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Precision in which a basis is found and kept: fp64 for fp64 leaves, fp32 for all others."""
    # Not promote_types, which strict promotion forbids.
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def dense_operator(leaf: jax.Array, view: MatrixView) -> MatrixOperator:
    """Operator of a matrix that exists.

    Args:
      leaf: One matrix in the layout of its parameter, any floating dtype.
      view: Which of its axes are kept and projected; no batch axes.

    Returns:
      The operator, working in fp32 (fp64 for fp64 input). Its products contract the axes where
      they are: nothing is transposed.
    """
    wide = leaf.astype(working_dtype(leaf.dtype))
    return MatrixOperator(
        shape=(view.kept_size, view.projected_size),
        dtype=wide.dtype,
        matmul=lambda v: view.project(wide, v, HIGHEST),
        rmatmul=lambda u: view.transposed.project(wide, u, HIGHEST),
        largest=lambda: jnp.max(jnp.abs(wide)),
        projects_input=view.projects_input,
        dense=lambda: view.to_matrices(wide),
    )


def mean_operator(operator: MatrixOperator, axis_name: collectives.AxisName) -> MatrixOperator:
    """The mean over devices of gradients that are local to each: what is reduced are its products.

    Args:
      operator: Of the local gradient.
      axis_name: The mapped axes; None leaves the operator as it is.

    Returns:
      The operator, equal on all devices. Its `dense` form reduces a whole matrix.
    """
    if axis_name is None:
        return operator
    dense = operator.dense

    def reduced(product: Product) -> Product:
        return lambda columns: collectives.mean(product(columns), axis_name)

    return dataclasses.replace(
        operator,
        matmul=reduced(operator.matmul),
        rmatmul=reduced(operator.rmatmul),
        largest=lambda: collectives.largest(operator.magnitude, axis_name),
        dense=None if dense is None else lambda: collectives.mean(dense(), axis_name),
    )
