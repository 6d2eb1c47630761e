"""How a basis moved, and by how much."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class BasisMove:
    """The change of one leaf's bases in one step.

    Args:
      old: ``[*batch, projected, rank]`` before the step.
      new: ``[*batch, projected, rank]`` after it; equal to `old` where nothing moved.
      moved: ``bool[*batch]``.
      first: ``bool[*batch]``, True where `old` is the initial basis, which means nothing.
    """

    old: jax.Array
    new: jax.Array
    moved: jax.Array
    first: jax.Array


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
    inner = jnp.einsum("...pr,...ps->...rs", old, new, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(inner**2, axis=(-2, -1)) / old.shape[-1]


def first_cosine(old: jax.Array, new: jax.Array) -> jax.Array:
    """``|cos|`` of the angle between the first columns, ``[*batch]``."""
    return jnp.abs(jnp.sum(old[..., 0] * new[..., 0], axis=-1))
