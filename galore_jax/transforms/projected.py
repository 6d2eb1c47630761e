"""Gradients that arrive projected, and the bases that they bring along."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.leaves import Leaves
from galore_jax.projectors import working_dtype
from galore_jax.transforms.config import LowRankConfig
from galore_jax.transforms.subspace import (
    LeafSubspace,
    Refreshed,
    decode,
    over_batch,
    replaced,
    unmoved,
    where_matrices,
)
from galore_jax.views import LeafPlan, ProjectedGradient


def use_projected_gradient(
    config: LowRankConfig, leaf: LeafSubspace, gradient: ProjectedGradient
) -> tuple[Refreshed, jax.Array]:
    """Takes over the bases that a gradient brings along.

    Args:
      config: The lens.
      leaf: The leaf.
      gradient: Projected gradient and the basis it was taken in.

    Returns:
      The bases, never one that is not finite, and R in their coordinates. Where it was said which
      bases are new they are taken as they are, and R is NaN where it was projected onto several at
      once (a sum over micro-batches, each of which found a basis of its own). Else the transport
      may turn what is new, and R with it.

    Raises:
      ValueError: Its arrays are not of the planned shapes.
    """
    plan = leaf.plan
    _check_shapes(plan, gradient)
    basis = gradient.basis.astype(working_dtype(plan.dtype))
    value = gradient.value.astype(config.state_dtype)
    still = unmoved(leaf.stored, leaf.due)
    usable = gradient.has_basis & jnp.all(jnp.isfinite(basis), axis=(-2, -1))
    if gradient.moved is not None:
        moved = gradient.moved & usable

        def take_over() -> tuple[Refreshed, jax.Array]:
            several = moved & gradient.is_sum
            return replaced(config, plan, leaf.stored, basis, moved & ~several, leaf.key), several

        refreshed, several = jax.lax.cond(
            jnp.any(moved), take_over, lambda: (still, jnp.zeros_like(moved))
        )
        return refreshed, jnp.where(several[..., None, None], jnp.nan, value)

    old = decode(config, plan, leaf.stored)
    moved = usable & jnp.any(basis != old, axis=(-2, -1))

    def turn() -> tuple[Refreshed, jax.Array]:
        turned = over_batch(config.transport.turn, basis.ndim - 2)(basis, old)
        change = jnp.einsum("...pr,...ps->...rs", basis, turned, precision="highest")
        along = jnp.einsum("...kr,...rs->...ks", value.astype(old.dtype), change)
        refreshed = replaced(config, plan, leaf.stored, turned, moved, leaf.key)
        return refreshed, where_matrices(moved, along.astype(value.dtype), value)

    return jax.lax.cond(jnp.any(moved), turn, lambda: (still, value))


def _check_shapes(plan: LeafPlan, gradient: ProjectedGradient) -> None:
    assert plan.view is not None
    expected = plan.view.low_rank_shape(plan.rank), plan.view.basis_shape(plan.rank)
    seen = jnp.shape(gradient.value), jnp.shape(gradient.basis)
    if seen != expected:
        raise ValueError(
            f"leaf {plan.path!r}: a ProjectedGradient has value {seen[0]} and basis {seen[1]}, but "
            f"the lens needs value {expected[0]} and basis {expected[1]}."
        )


def updates_like(updates: optax.Updates, params: optax.Params | None) -> Any:
    """Arrays that updates are to be sharded like: gradients, or parameters of projected ones."""
    grads = Leaves.of(updates)
    if params is None or not any(isinstance(grad, ProjectedGradient) for grad in grads.values):
        return updates
    own = [jax.tree.leaves(leaf)[0] for leaf in Leaves.of(params).values]  # codes, of some
    return grads.boxed(own)
