"""Gradients that arrive projected, and the bases that they bring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.projectors import working_dtype
from galore_jax.transforms.config import LowRankConfig
from galore_jax.transforms.subspace import (
    Refreshed,
    decode,
    replaced,
    unmoved,
    where_matrices,
)
from galore_jax.views import LeafPlan, ProjectedGradient
from galore_jax.views.leaves import abstract, flatten_leaves, rebox


def adopt(
    config: LowRankConfig, plan: LeafPlan, gradient: ProjectedGradient, stored: Any
) -> tuple[Refreshed, jax.Array]:
    """Takes over the basis of a gradient that arrives projected.

    Args:
      config: The lens.
      plan: The leaf's plan.
      gradient: Projected gradient and the basis it was taken in.
      stored: The stored bases.

    Returns:
      The stored bases with the new ones in their places (never one that is not finite), and R in
      the coordinates of the result, ``[*batch, kept, rank]``.
    """
    _check_shapes(plan, gradient)
    basis = gradient.basis.astype(working_dtype(plan.dtype))
    value = gradient.value.astype(config.state_dtype)
    finite = gradient.has_basis & jnp.all(jnp.isfinite(basis), axis=(-2, -1))
    if gradient.moved is not None:
        moved = gradient.moved & finite
        return _take_over(config, stored, gradient, basis, moved, value)
    old = decode(config, plan, stored)
    moved = finite & jnp.any(basis != old, axis=(-2, -1))
    return _turn(config, plan, stored, moved, value, old=old, new=basis)


def _take_over(
    config: LowRankConfig,
    stored: Any,
    gradient: ProjectedGradient,
    basis: jax.Array,
    moved: jax.Array,
    value: jax.Array,
) -> tuple[Refreshed, jax.Array]:
    """New bases as they are. What was projected onto several at once becomes NaN.

    That is a gradient summed up over micro-batches, each of which found a basis of its own. Bases
    that were there stay, and stay due.
    """

    def take_over() -> tuple[Refreshed, jax.Array]:
        several = gradient.is_sum
        usable = moved & ~several
        poisoned = jnp.where(several[..., None, None], jnp.nan, value)
        encoded = config.codec.encode(basis)
        return replaced(config, basis.dtype, stored, encoded, usable), poisoned

    return jax.lax.cond(jnp.any(moved), take_over, lambda: (unmoved(stored, moved), value))


def _turn(
    config: LowRankConfig,
    plan: LeafPlan,
    stored: Any,
    moved: jax.Array,
    value: jax.Array,
    *,
    old: jax.Array,
    new: jax.Array,
) -> tuple[Refreshed, jax.Array]:
    """New bases turned by the transport, and the projected gradient with them."""

    def turn() -> tuple[Refreshed, jax.Array]:
        turned = _over_batch(config.transport.turn, plan)(new, old)
        change = jnp.einsum("...pr,...ps->...rs", new, turned, precision="highest")
        along = jnp.einsum("...kr,...rs->...ks", value.astype(old.dtype), change)
        encoded = config.codec.encode(turned)
        turned_value = where_matrices(moved, along.astype(value.dtype), value)
        return replaced(config, new.dtype, stored, encoded, moved), turned_value

    return jax.lax.cond(jnp.any(moved), turn, lambda: (unmoved(stored, moved), value))


def full_shapes(updates: optax.Updates, params: optax.Params | None) -> Any:
    """Shapes of the leaves; those of projected gradients are read off the parameters."""
    leaves, treedef = flatten_leaves(updates)
    if any(isinstance(leaf, ProjectedGradient) for leaf in leaves):
        if params is None:
            raise ValueError(
                "a ProjectedGradient does not know the shape of its parameter: pass `params` to "
                "update."
            )
        leaves, treedef = flatten_leaves(params)
    return treedef.unflatten(map(abstract, leaves))


def alike(updates: optax.Updates, params: optax.Params | None) -> Any:
    """Arrays that updates are to be sharded like: gradients, or parameters of projected ones."""
    leaves, _ = flatten_leaves(updates)
    if params is None or not any(isinstance(leaf, ProjectedGradient) for leaf in leaves):
        return updates
    own = [jax.tree.leaves(leaf)[0] for leaf in flatten_leaves(params)[0]]  # codes, of some
    return rebox(updates, own)


def _check_shapes(plan: LeafPlan, gradient: ProjectedGradient) -> None:
    assert plan.view is not None
    expected = plan.view.low_rank_shape(plan.rank), plan.view.basis_shape(plan.rank)
    seen = gradient.value.shape, gradient.basis.shape
    if seen != expected:
        raise ValueError(
            f"leaf {plan.path!r}: a ProjectedGradient has value {seen[0]} and basis {seen[1]}, but "
            f"the lens needs value {expected[0]} and basis {expected[1]}."
        )


def _over_batch(fn: Callable[..., jax.Array], plan: LeafPlan) -> Callable[..., jax.Array]:
    assert plan.view is not None
    for _ in plan.view.batch:
        fn = jax.vmap(fn)
    return fn
