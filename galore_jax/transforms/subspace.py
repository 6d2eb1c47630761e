"""One leaf, one step: refresh its bases, project its gradient, lift its update.

The pieces of the lens that other ways of taking a gradient need apart: accumulation, a backward
pass that projects, a layer-wise step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax import keys
from galore_jax.projectors import MatrixOperator, dense_operator
from galore_jax.transforms.config import LowRankConfig
from galore_jax.views import LeafPlan, ProjectedGradient


class Refreshed(NamedTuple):
    """Stored bases of one leaf after its refresh, and ``bool[*batch]``: which of them moved."""

    stored: Any
    moved: jax.Array


def basis_dtype(plan: LeafPlan) -> jax.typing.DTypeLike:
    """Working precision of a leaf's basis: fp32, or fp64 for fp64 leaves."""
    return jnp.promote_types(plan.dtype, jnp.float32)


def decode(config: LowRankConfig, plan: LeafPlan, stored: Any) -> jax.Array:
    """The basis that projects and lifts, ``[*batch, projected, rank]``."""
    assert plan.view is not None
    basis = config.codec.decode(stored, basis_dtype(plan))
    expected = plan.view.basis_shape(plan.rank)
    if basis.shape != expected:
        raise ValueError(
            f"leaf {plan.path!r}: the state holds a basis of shape {basis.shape}, but this "
            f"transformation needs {expected}. It was made with another rank, side or axes, or for "
            "other parameters: init anew, or restore with the old values."
        )
    return basis


def initial_basis(config: LowRankConfig, plan: LeafPlan) -> Any:
    """The first coordinate vectors: orthonormal, so that nothing is ever projected to zero."""
    assert plan.view is not None
    *_, projected, rank = shape = plan.view.basis_shape(plan.rank)
    return config.codec.encode(
        jnp.broadcast_to(jnp.eye(projected, rank, dtype=basis_dtype(plan)), shape)
    )


def refresh(
    config: LowRankConfig,
    plan: LeafPlan,
    gradient: jax.Array,
    stored: Any,
    *,
    due: jax.Array,
    cold: jax.Array,
    count: jax.Array,
) -> Refreshed:
    """Recomputes the bases of the matrices that are due, from the gradient.

    One conditional with a scalar predicate per leaf, however many layers it stacks; inside it, a
    loop runs over the due matrices only, so that one factorization's memory is live at a time.

    Args:
      config: The lens.
      plan: The leaf's plan.
      gradient: The leaf's gradient, in the leaf's shape.
      stored: Its stored bases.
      due: ``bool[*batch]``.
      cold: ``bool[*batch]``, True where the stored basis is still the initial one.
      count: int32 scalar, the optimizer step.

    Returns:
      The stored bases, and which of them moved. A gradient that is not finite, or is zero,
      moves nothing.
    """
    view = plan.view
    assert view is not None
    leaf_key = keys.leaf_key(config.seed, count, plan.path)

    def refresh_matrix(index: jax.Array | int, stored: Any, cold: jax.Array) -> Refreshed:
        operator = dense_operator(view.matrix(gradient, index), projects_input=view.projects_input)
        return _refresh_matrix(
            config, plan, operator, stored, cold=cold, key=keys.matrix_key(leaf_key, index)
        )

    def refresh_due() -> Refreshed:
        if not view.batch:
            return refresh_matrix(0, stored, cold)
        return _loop_over_due(refresh_matrix, stored, due, cold)

    return jax.lax.cond(jnp.any(due), refresh_due, lambda: Refreshed(stored, jnp.zeros_like(due)))


def _refresh_matrix(
    config: LowRankConfig,
    plan: LeafPlan,
    gradient: MatrixOperator,
    stored: Any,
    *,
    cold: jax.Array,
    key: jax.Array,
) -> Refreshed:
    previous = config.codec.decode(stored, gradient.dtype)
    basis = config.projector.basis(gradient, plan.rank, previous=previous, cold=cold, key=key)
    basis = config.transport.turn(basis, previous)
    usable = gradient.is_usable & jnp.all(jnp.isfinite(basis))
    encoded = config.codec.encode(basis.astype(basis_dtype(plan)))
    return Refreshed(_where(usable, encoded, stored), usable)


def _loop_over_due(
    refresh_matrix: Callable[..., Refreshed], stored: Any, due: jax.Array, cold: jax.Array
) -> Refreshed:
    """Runs over the due matrices of a stack, updating the stored bases in place."""
    batch = due.shape
    due, cold = due.reshape(-1), cold.reshape(-1)
    order = jnp.argsort(~due, stable=True)  # due matrices first

    def body(step: jax.Array, carry: Refreshed) -> Refreshed:
        index = order[step]
        current = jax.tree.map(lambda part: _at(part, index), carry.stored)
        matrix = refresh_matrix(index, current, cold[index])
        return jax.tree.map(
            lambda stack, part: jax.lax.dynamic_update_index_in_dim(stack, part, index, 0),
            carry,
            matrix,
        )

    flat = jax.tree.map(lambda part: part.reshape(-1, *part.shape[len(batch) :]), stored)
    result = jax.lax.fori_loop(0, jnp.sum(due), body, Refreshed(flat, jnp.zeros_like(due)))
    return jax.tree.map(lambda part: part.reshape(*batch, *part.shape[1:]), result)


def project(
    config: LowRankConfig, plan: LeafPlan, gradient: jax.Array, basis: jax.Array
) -> jax.Array:
    """R = G·P, ``[*batch, kept, rank]`` in the state dtype."""
    assert plan.view is not None
    return plan.view.project(gradient, basis).astype(config.state_dtype)


def lift(plan: LeafPlan, low_rank: jax.Array, basis: jax.Array, scale: jax.Array) -> jax.Array:
    """scale·N·Pᵀ in the shape and dtype of the leaf; scaled while it is still small."""
    assert plan.view is not None
    scaled = low_rank * jnp.asarray(scale, low_rank.dtype)
    return plan.view.lift(scaled, basis, plan.dtype)


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
      The stored bases with those that differ replaced (turned by the transport), and R in the
      coordinates of the result, ``[*batch, kept, rank]``.
    """
    assert plan.view is not None
    _check_shapes(plan, gradient)
    old = decode(config, plan, stored)
    new = gradient.basis.astype(old.dtype)
    moved = jnp.any(new != old, axis=(-2, -1))

    def turn() -> tuple[Any, jax.Array]:
        turned = _over_batch(config.transport.turn, plan)(new, old)
        encoded = config.codec.encode(turned)
        change = jnp.einsum("...pr,...ps->...rs", new, turned, precision="highest")
        value = jnp.einsum("...kr,...rs->...ks", gradient.value.astype(old.dtype), change)
        return _where(moved, encoded, stored), _where(
            moved, value.astype(config.state_dtype), gradient.value.astype(config.state_dtype)
        )

    def stay() -> tuple[Any, jax.Array]:
        return stored, gradient.value.astype(config.state_dtype)

    result, value = jax.lax.cond(jnp.any(moved), turn, stay)
    return Refreshed(result, moved), value


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


def _at(stack: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `condition` (batch axes), part by part of a stored form."""

    def select(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b
        )

    return jax.tree.map(select, new, old)
