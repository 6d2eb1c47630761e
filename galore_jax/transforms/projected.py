"""Gradients that arrive projected, and the bases that they bring along."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.projectors import working_dtype
from galore_jax.transforms.config import LowRankConfig
from galore_jax.transforms.subspace import (
    LeafSubspace,
    Refreshed,
    decode,
    over_batch,
    replaced,
)
from galore_jax.views import ProjectedGradient
from galore_jax.views.leaves import Leaves


def use_projected_gradient(
    config: LowRankConfig, leaf: LeafSubspace, gradient: ProjectedGradient
) -> tuple[Refreshed, jax.Array]:
    """Takes over the bases that a gradient brings along.

    Args:
      config: The lens.
      leaf: The leaf.
      gradient: Projected gradient and the basis it was taken in.

    Returns:
      The bases, and how R comes into their coordinates: where it was said which bases are new,
      ``bool[*batch]``, True where R was projected onto several at once and means nothing (a sum
      over micro-batches, each of which found a basis of its own); else the matrix to multiply it
      with, ``[*batch, rank, rank]``, because the transport may have turned what is new.
    """
    plan = leaf.plan
    basis = gradient.basis.astype(working_dtype(plan.dtype))
    moved = _arrives(config, leaf, gradient)
    if gradient.moved is not None:
        several = moved & gradient.is_sum
        return replaced(config, plan, leaf.stored, basis, moved & ~several, leaf.key), several
    old = decode(config, plan, leaf.stored)
    turned = over_batch(config.transport.turn, basis.ndim - 2)(basis, old)
    turn = jnp.einsum("...pr,...ps->...rs", basis, turned, precision="highest")
    turn = jnp.where(moved[..., None, None], turn, jnp.eye(plan.rank, dtype=turn.dtype))
    return replaced(config, plan, leaf.stored, turned, moved, leaf.key), turn


def no_correction(leaf: LeafSubspace, gradient: ProjectedGradient) -> jax.Array:
    """The correction of a step on which no basis moves."""
    if gradient.moved is not None:
        return jnp.zeros_like(leaf.due)
    eye = jnp.eye(leaf.plan.rank, dtype=working_dtype(leaf.plan.dtype))
    return jnp.broadcast_to(eye, (*leaf.plan.batch_shape, *eye.shape))


def into_new_bases(value: jax.Array, correction: jax.Array) -> jax.Array:
    """R of a projected gradient, corrected as `use_projected_gradient` says."""
    if correction.dtype == bool:
        return jnp.where(correction[..., None, None], jnp.nan, value)
    along = jnp.einsum("...kr,...rs->...ks", value.astype(correction.dtype), correction)
    return along.astype(value.dtype)


def brings_bases(
    config: LowRankConfig, leaf: LeafSubspace, gradient: ProjectedGradient
) -> jax.Array:
    """Scalar: whether a projected gradient has a basis that is new.

    Raises:
      ValueError: Its arrays are not of the planned shapes.
    """
    view, plan = leaf.plan.view, leaf.plan
    assert view is not None
    expected = view.low_rank_shape(plan.rank), view.basis_shape(plan.rank)
    seen = jnp.shape(gradient.value), jnp.shape(gradient.basis)
    if seen != expected:
        raise ValueError(
            f"leaf {plan.path!r}: a ProjectedGradient has value {seen[0]} and basis {seen[1]}, but "
            f"the lens needs value {expected[0]} and basis {expected[1]}."
        )
    return jnp.any(_arrives(config, leaf, gradient))


def _arrives(config: LowRankConfig, leaf: LeafSubspace, gradient: ProjectedGradient) -> jax.Array:
    """``bool[*batch]``, which bases of a projected gradient are new and finite."""
    moved = gradient.moved
    if moved is None:
        basis = gradient.basis.astype(working_dtype(leaf.plan.dtype))
        moved = jnp.any(basis != decode(config, leaf.plan, leaf.stored), axis=(-2, -1))
    return moved & gradient.has_basis & jnp.all(jnp.isfinite(gradient.basis), axis=(-2, -1))


def updates_like(updates: optax.Updates, params: optax.Params | None) -> Any:
    """Arrays that updates are to be sharded like: gradients, or parameters of projected ones."""
    grads = Leaves.of(updates)
    if params is None or not any(isinstance(grad, ProjectedGradient) for grad in grads.values):
        return updates
    own = [jax.tree.leaves(leaf)[0] for leaf in Leaves.of(params).values]  # codes, of some
    return grads.boxed(own)
