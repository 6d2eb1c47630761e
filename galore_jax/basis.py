"""The change of a basis in one step, and two measures of it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class BasisChange:
    """The change of one leaf's bases in one step.

    Args:
      old: ``[*batch, projected, rank]`` before the step.
      new: ``[*batch, projected, rank]`` after it; equal to `old` where nothing moved.
      moved: ``bool[*batch]``.
      was_initial: ``bool[*batch]``, True where `old` is the initial basis, which means nothing.
    """

    old: jax.Array
    new: jax.Array
    moved: jax.Array
    was_initial: jax.Array


def overlap(old: jax.Array, new: jax.Array) -> jax.Array:
    r"""Share of a subspace that lies in another one, :math:`\|P_{old}^\top P_{new}\|_F^2 / r`.

    The mean squared cosine of the angles between them: one for equal subspaces, whatever their
    bases; rank / projected on average for two random ones.

    Args:
      old: ``[*batch, projected, rank]``, orthonormal columns.
      new: The same.

    Returns:
      ``[*batch]``, between zero and one.
    """
    product = jnp.einsum("...pr,...ps->...rs", old, new, precision=HIGHEST)
    return jnp.sum(product**2, axis=(-2, -1)) / old.shape[-1]


def inverse_gram(basis: jax.Array) -> jax.Array:
    """``(PᵀP)⁻¹ [*batch, rank, rank]``: the identity, up to what storage did to P.

    Newton's iteration, from below: a column of zeros, which few bits may make of a small one, gets
    a weight that is finite. By products alone: batches of factorizations that run side by side can
    block each other on the CPU, where each waits for threads that the others hold (jaxlib 0.10).
    """
    gram = jnp.einsum("...pr,...ps->...rs", basis, basis, precision=HIGHEST)
    largest = jnp.max(jnp.sum(jnp.abs(gram), axis=-1), axis=-1)  # of the eigenvalues, or above
    start = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    start = start / largest[..., None, None]

    def improve(_: int, inverse: jax.Array) -> jax.Array:
        step = jnp.matmul(gram, inverse, precision=HIGHEST)
        return 2 * inverse - jnp.matmul(inverse, step, precision=HIGHEST)

    # The error is squared in each: enough for eigenvalues that are a hundred times apart.
    return jax.lax.fori_loop(0, 11, improve, start)


def first_cosine(old: jax.Array, new: jax.Array) -> jax.Array:
    """``|cos|`` of the angle between the first columns, ``[*batch]``."""
    return jnp.abs(jnp.sum(old[..., 0] * new[..., 0], axis=-1))
