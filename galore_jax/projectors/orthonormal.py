"""Orthonormal columns from matrix products and rank-sized factorizations only."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from galore_jax.projectors.operator import HIGHEST

# Relative diagonal shifts of the three Cholesky passes. The first two keep the factorization
# alive for columns that are nearly dependent; the last, unshifted, makes them orthonormal.
_SHIFTS = (1e-6, 1e-7, 0.0)
# Share of `fill` mixed into each unit column: supplies the missing directions of a
# rank-deficient input without turning those it has.
_FILL = 1e-4


def orthonormalize(columns: jax.Array, fill: jax.Array) -> jax.Array:
    """Orthonormal basis of the span of `columns`, completed by directions of `fill`.

    Three passes of shifted Cholesky QR: Q ← Q·L⁻ᵀ with L·Lᵀ = QᵀQ + shift. Only tall-times-small
    products touch the long axis, so it runs at matmul speed on accelerators and a sharded long
    axis is never gathered (a triangular solve on it would be).

    Args:
      columns: ``[n, k]``, k ≤ n, finite, its squares too; may be zero or rank-deficient.
      fill: ``[n, k]`` with independent columns of about unit norm.

    Returns:
      ``[n, k]`` with max|QᵀQ − I| around 1e-6 in fp32.

    References:
      Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of ill-conditioned
      matrices", 2020.
    """
    norms = jnp.sqrt(jnp.sum(columns * columns, axis=0, keepdims=True))
    mixed = columns / jnp.where(norms > 0, norms, 1) + _FILL * fill
    identity = jnp.eye(columns.shape[-1], dtype=columns.dtype)
    shifts = jnp.asarray(_SHIFTS, columns.dtype)

    def cholesky_pass(i: jax.Array, q: jax.Array) -> jax.Array:
        gram = jnp.matmul(q.T, q, precision=HIGHEST)
        shifted = gram + shifts[i] * jnp.trace(gram) * identity
        lower = jax.lax.linalg.cholesky(shifted, symmetrize_input=False)
        inverse = jax.lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
        return jnp.matmul(q, inverse.T, precision=HIGHEST)

    # A loop, not three copies: a third of the compile time.
    return jax.lax.fori_loop(0, len(_SHIFTS), cholesky_pass, mixed)
