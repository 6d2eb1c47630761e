"""One leaf, one step: refresh its bases, project its gradient, lift its update.

The pieces of the lens that other ways of taking a gradient need apart: accumulation, a backward
pass that projects, a layer-wise step.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.basis import overlap
from galore_jax.projectors import (
    MatrixOperator,
    dense_operator,
    mean_operator,
    select_operator,
    working_dtype,
)
from galore_jax.transforms.config import LowRankConfig
from galore_jax.views import LeafPlan


class Refreshed(NamedTuple):
    """The bases of one leaf after its refresh.

    Args:
      stored: Their stored form.
      moved: ``bool[*batch]``, which of them are new.
      overlap: ``float32[*batch]``, how much of the old subspace lies in the new one; zero where
        nothing moved.
    """

    stored: Any
    moved: jax.Array
    overlap: jax.Array


class LeafSubspace(NamedTuple):
    """What the state knows about the subspaces of one leaf at the start of a step.

    Args:
      plan: The leaf's plan.
      stored: Its stored bases.
      due: ``bool[*batch]``.
      refreshes: ``int32[*batch]``, how often each basis has been recomputed.
      key: ``uint32[*batch, 2]``, randomness for this step.
    """

    plan: LeafPlan
    stored: Any
    due: jax.Array
    refreshes: jax.Array
    key: jax.Array

    @property
    def cold(self) -> jax.Array:
        """``bool[*batch]``, True where the stored basis is still the initial one."""
        return self.refreshes == 0


def decode(config: LowRankConfig, plan: LeafPlan, stored: Any) -> jax.Array:
    """The basis that projects and lifts, ``[*batch, projected, rank]``."""
    return config.codec.decode(stored, working_dtype(plan.dtype))


def check_stored(config: LowRankConfig, plan: LeafPlan, stored: Any) -> None:
    """Raises if the stored basis of a leaf is not of the planned shape."""
    assert plan.view is not None
    seen = jax.eval_shape(lambda s: decode(config, plan, s), stored).shape
    expected = plan.view.basis_shape(plan.rank)
    if seen != expected:
        raise ValueError(
            f"leaf {plan.path!r}: the state holds a basis of shape {seen}, but this transformation "
            f"needs {expected}. It was made with another rank, side or axes, or for other "
            "parameters: init anew, or restore with the old values."
        )


def unmoved(stored: Any, batch: jax.Array) -> Refreshed:
    """A leaf whose bases stay; `batch` is any array of the shape of its batch axes."""
    return Refreshed(
        stored, jnp.zeros_like(batch, dtype=bool), jnp.zeros_like(batch, dtype=jnp.float32)
    )


def replaced(
    config: LowRankConfig, dtype: Any, stored: Any, encoded: Any, usable: jax.Array
) -> Refreshed:
    """New bases in the places of old ones, where they are usable.

    Here both are at hand. Compared later, the old ones would have to be kept for every step.

    Args:
      config: The lens.
      dtype: What stored bases are decoded to.
      stored: Stored forms, ``[*batch, projected, rank]`` before the codec.
      encoded: The new ones.
      usable: ``bool[*batch]``.
    """
    old, new = (config.codec.decode(basis, dtype) for basis in (stored, encoded))
    share = jnp.minimum(overlap(old, new), 1).astype(jnp.float32)  # few bits are not orthonormal
    return Refreshed(
        stored=where_matrices(usable, encoded, stored),
        moved=usable,
        overlap=jnp.where(usable, share, jnp.zeros_like(share)),
    )


def initial_basis(config: LowRankConfig, plan: LeafPlan) -> Any:
    """The first coordinate vectors: orthonormal, so that nothing is ever projected to zero."""
    assert plan.view is not None
    *_, projected, rank = shape = plan.view.basis_shape(plan.rank)
    return config.codec.encode(
        jnp.broadcast_to(jnp.eye(projected, rank, dtype=working_dtype(plan.dtype)), shape)
    )


# A gradient matrix by its number along the flattened batch axes of its leaf.
Matrices = Callable[[jax.Array], MatrixOperator]


def refresh(
    config: LowRankConfig, group: list[LeafSubspace], gradients: list[Matrices]
) -> list[Refreshed]:
    """Recomputes the bases that are due, from their gradients.

    One conditional with a scalar predicate for all matrices of the group, however many leaves
    and layers; inside it, a loop over the due ones only, so that one factorization is compiled
    and the memory of one is live at a time.

    Args:
      config: The lens.
      group: Leaves whose plans differ in their paths only.
      gradients: Their gradients, known by their products.

    Returns:
      Per leaf the stored bases, which of them moved, and how far. A gradient that is not finite,
      or is zero, moves nothing.
    """
    any_due = jnp.any(jnp.stack([jnp.any(leaf.due) for leaf in group]))
    return jax.lax.cond(
        any_due,
        lambda: _refresh_due(config, group, gradients),
        lambda: [unmoved(leaf.stored, leaf.due) for leaf in group],
    )


class _Progress(NamedTuple):
    """Loop state over the matrices of a group."""

    left: jax.Array
    refreshed: Refreshed


def _refresh_due(
    config: LowRankConfig, group: list[LeafSubspace], gradients: list[Matrices]
) -> list[Refreshed]:
    """Runs over the due matrices of all leaves, updating the stored bases in place."""
    plan = group[0].plan
    view = plan.view
    assert view is not None
    due, cold, key, stored = (
        _concatenate(view.batch_shape, [getattr(leaf, name) for leaf in group])
        for name in ("due", "cold", "key", "stored")
    )

    def body(progress: _Progress) -> _Progress:
        # Unsigned: an index that cannot be negative needs no wrapping around.
        number = jnp.argmax(progress.left).astype(jnp.uint32)
        leaf, index = (0, number) if len(group) == 1 else jnp.divmod(number, view.num_matrices)
        makers = [functools.partial(gradient, index) for gradient in gradients]
        refreshed = _refresh_matrix(
            config,
            plan,
            mean_operator(select_operator(leaf, makers), config.axis_name),
            jax.tree.map(lambda parts: _at(parts, number), progress.refreshed.stored),
            cold=_at(cold, number),
            key=_at(key, number),
        )
        return jax.tree.map(
            lambda parts, part: jax.lax.dynamic_update_index_in_dim(parts, part, number, 0),
            progress,
            _Progress(jnp.zeros((), bool), refreshed),
        )

    start = _Progress(due, unmoved(stored, due))
    done = jax.lax.while_loop(lambda progress: jnp.any(progress.left), body, start)
    return _split(view.batch_shape, len(group), done.refreshed)


def dense_matrices(plan: LeafPlan, gradient: jax.Array) -> Matrices:
    """The matrices of a gradient that exists, in the shape of its leaf."""
    view = plan.view
    assert view is not None
    return lambda index: dense_operator(view.entry(gradient, index), view.unbatched)


def _refresh_matrix(
    config: LowRankConfig,
    plan: LeafPlan,
    gradient: MatrixOperator,
    stored: Any,
    *,
    cold: jax.Array,
    key: jax.Array,
) -> Refreshed:
    """Recomputes one basis from a gradient that is known by its products.

    Args:
      config: The lens.
      plan: Plan of the leaf that the matrix is of.
      gradient: The gradient matrix.
      stored: The stored form of its basis.
      cold: Scalar bool, whether that is the initial one.
      key: ``uint32[2]``.

    Returns:
      The stored form of the new basis, whether it moved, and how far.
    """
    previous = config.codec.decode(stored, gradient.dtype)
    basis = config.projector.basis(gradient, plan.rank, previous=previous, cold=cold, key=key)
    basis = config.transport.turn(basis, previous)
    usable = gradient.is_usable & jnp.all(jnp.isfinite(basis))
    encoded = config.codec.encode(basis.astype(working_dtype(plan.dtype)))
    return replaced(config, gradient.dtype, stored, encoded, usable)


def _concatenate(batch: tuple[int, ...], leaves: list[Any]) -> Any:
    """Stored forms ``[*batch, ...]`` of several leaves -> ``[leaves · matrices, ...]``."""

    def flat(*parts: jax.Array) -> jax.Array:
        rows = [part.reshape(-1, *part.shape[len(batch) :]) for part in parts]
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows)

    return jax.tree.map(flat, *leaves)


def _split(batch: tuple[int, ...], count: int, flat: Any) -> list[Any]:
    """Inverse of `_concatenate`."""
    per_leaf = jax.tree.map(lambda part: part.reshape(count, *batch, *part.shape[1:]), flat)
    return [jax.tree.map(operator.itemgetter(leaf), per_leaf) for leaf in range(count)]


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


def _at(parts: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(parts, number, 0, keepdims=False)


def where_matrices(condition: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `condition` (batch axes), part by part of a stored form."""

    def select(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b
        )

    return jax.tree.map(select, new, old)
