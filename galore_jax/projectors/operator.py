"""A gradient matrix known by its products, so that a basis can be found without forming it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class MatrixOperator:
    """G ``[kept, projected]`` as two products, scaled so that its largest entry is about one.

    The scaling keeps ``GᵀG`` inside the range of fp32 for gradients anywhere between 1e-30 and
    1e30. A basis does not depend on it.

    Args:
      shape: ``(kept, projected)``.
      dtype: Working precision of the products.
      matmul: ``[projected, k] -> [kept, k]``, G·V.
      rmatmul: ``[kept, k] -> [projected, k]``, Gᵀ·U.
      magnitude: Scalar, the largest absolute entry of G; NaN or inf if G has one.
      projects_input: Whether the projected axis is the reduction axis of the leaf.
      dense: The unscaled matrix ``[kept, projected]``, or None where it is never formed.
    """

    shape: tuple[int, int]
    dtype: jax.typing.DTypeLike
    matmul: Callable[[jax.Array], jax.Array]
    rmatmul: Callable[[jax.Array], jax.Array]
    magnitude: jax.Array
    projects_input: bool
    dense: jax.Array | None = None

    @property
    def is_usable(self) -> jax.Array:
        """Whether there is a direction to find: finite and not zero."""
        return jnp.isfinite(self.magnitude) & (self.magnitude > 0)


def dense_operator(matrix: jax.Array, *, projects_input: bool) -> MatrixOperator:
    """Operator of a matrix that exists.

    Args:
      matrix: ``[kept, projected]``, any floating dtype.
      projects_input: Whether the projected axis is the reduction axis of the leaf.

    Returns:
      The operator, working in fp32 (fp64 for fp64 input).
    """
    dense = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    magnitude = jnp.max(jnp.abs(dense))
    # Half of the scaling before the product and half after it: neither overflows.
    half = jax.lax.rsqrt(jnp.where(magnitude > 0, magnitude, 1))

    def product(transpose: bool) -> Callable[[jax.Array], jax.Array]:
        factor = dense.T if transpose else dense
        return lambda other: jnp.matmul(factor, other * half, precision=HIGHEST) * half

    return MatrixOperator(
        shape=(dense.shape[0], dense.shape[1]),
        dtype=dense.dtype,
        matmul=product(transpose=False),
        rmatmul=product(transpose=True),
        magnitude=magnitude,
        projects_input=projects_input,
        dense=dense,
    )
