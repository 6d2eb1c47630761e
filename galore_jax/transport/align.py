"""Transports that leave the inner state untouched: `align` and `keep`."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from galore_jax.transport.base import HIGHEST, Transport


@dataclasses.dataclass(frozen=True)
class keep(Transport):
    """Moments stay, column for column, whatever the new columns mean (the paper).

    Only sensible for projectors whose columns keep their meaning: `svd` and `gram_eigh`. Others
    are refused when the lens is built.

    Example:
      >>> import galore_jax as gj
      >>> gj.transport.keep()
      keep()
    """

    needs_canonical_columns = True


@dataclasses.dataclass(frozen=True)
class align(Transport):
    """Turns the new basis instead of the state, so that it serves any inner transformation.

    Of all orthonormal bases of the new subspace, takes the one closest to the old basis
    (orthogonal Procrustes): with P_newᵀ·P_old = U·Σ·Vᵀ,  P = P_new·U·Vᵀ. Moments that stay where
    they are then refer to (nearly) the same directions. Column order carries no meaning.

    Example:
      >>> import galore_jax as gj
      >>> gj.transport.align()
      align()

    References:
      Schönemann, "A generalized solution of the orthogonal Procrustes problem", 1966.
    """

    needs_orthonormal = True
    keeps_columns = False

    def turn(self, new, old):
        overlap = jnp.matmul(new.T, old.astype(new.dtype), precision=HIGHEST)
        left, _, right = jnp.linalg.svd(overlap)
        return jnp.matmul(new, jnp.matmul(left, right, precision=HIGHEST), precision=HIGHEST)
