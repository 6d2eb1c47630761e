"""The stages of a step of the lens, from gradients to updates, over all leaves of a tree."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax import mapped
from galore_jax.basis import BasisMove
from galore_jax.keys import matrix_keys
from galore_jax.refresh import places_of
from galore_jax.transforms import adopted, subspace
from galore_jax.transforms.config import LowRankConfig
from galore_jax.transforms.inner import at_full_size
from galore_jax.transforms.state import LowRankState, RefreshState
from galore_jax.transforms.subspace import LeafSubspace, Refreshed
from galore_jax.views import LeafPlan, ProjectedGradient

Layer = jax.Array | int


class Entered(NamedTuple):
    """One leaf on its way through the subspace.

    Args:
      value: What the inner transformation sees.
      stored: The stored bases of this step.
      move: How they moved; None where the leaf is not projected.
      overlap: How much of each old subspace is in the new one; None as well.
    """

    value: Any
    stored: Any
    move: BasisMove | None
    overlap: jax.Array | None


def subspaces(
    state: LowRankState, treedef: Any, plans: list[LeafPlan], layer: Layer = 0
) -> list[LeafSubspace]:
    """What the state knows about every leaf.

    Args:
      state: State of the lens.
      treedef: Structure of its trees.
      plans: One plan per leaf.
      layer: See `low_rank_projection`.

    Returns:
      One entry per leaf; those of leaves that are not projected hold placeholders.
    """
    trees = state.projectors, state.refresh_state.due, state.refresh_state.refreshes
    per_leaf = zip(plans, *map(treedef.flatten_up_to, trees), strict=True)
    return [
        LeafSubspace(
            plan=plan,
            stored=stored,
            due=due,
            refreshes=refreshes,
            key=matrix_keys(state.config.seed, state.count, plan.path, plan.batch_shape, layer),
        )
        for plan, stored, due, refreshes in per_leaf
    ]


def refresh(
    config: LowRankConfig, leaves: Sequence[LeafSubspace], gradients: Sequence[Any]
) -> list[Refreshed | None]:
    """Refreshes all leaves that bring a gradient; equal matrices share one conditional."""
    groups: dict[Any, list[int]] = {}
    for i, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        if leaf.plan.is_projected and not isinstance(gradient, ProjectedGradient):
            groups.setdefault(_alike(leaf.plan), []).append(i)
    refreshed: list[Refreshed | None] = [None] * len(leaves)
    for members in groups.values():
        results = subspace.refresh(
            config,
            [leaves[i] for i in members],
            [subspace.dense_matrices(leaves[i].plan, gradients[i]) for i in members],
        )
        for i, result in zip(members, results, strict=True):
            refreshed[i] = result
    return refreshed


def _alike(plan: LeafPlan) -> Any:
    """What two leaves share if they are the same weight of two layers.

    Equal shapes are not enough: a query and an output kernel may be sharded differently, and their
    bases would have to move between devices to be looped over together.
    """
    return re.sub(r"\d+", "#", plan.path), plan.view, plan.rank, plan.dtype


def enter(
    config: LowRankConfig, leaf: LeafSubspace, gradient: Any, refreshed: Refreshed | None
) -> Entered:
    """Takes a gradient to the subspace of this step, and its mean over devices."""
    if leaf.plan.is_projected:
        entered = take(config, leaf, gradient, refreshed)
        return entered._replace(value=mapped.mean(entered.value, config.axis_name))
    if leaf.plan.is_inexact and not isinstance(gradient, ProjectedGradient):
        gradient = mapped.mean(gradient, config.axis_name)  # in its own dtype
    return take(config, leaf, gradient, refreshed)


def take(
    config: LowRankConfig, leaf: LeafSubspace, gradient: Any, refreshed: Refreshed | None
) -> Entered:
    """Projects a gradient onto the bases of this step."""
    plan = leaf.plan
    if not plan.is_projected:
        if isinstance(gradient, ProjectedGradient):
            raise ValueError(
                f"leaf {plan.path!r} of shape {plan.shape} is not projected by this lens "
                f"({plan.reason}), but its gradient is a ProjectedGradient: pass the gradient."
            )
        return Entered(at_full_size(config, plan, gradient), leaf.stored, None, None)
    old = subspace.decode(config, plan, leaf.stored)
    if refreshed is None:
        refreshed, value = adopted.adopt(config, plan, gradient, leaf.stored)
        new = subspace.decode(config, plan, refreshed.stored)
    else:
        new = subspace.decode(config, plan, refreshed.stored)
        value = subspace.project(config, plan, gradient, new)
    move = BasisMove(old, new, refreshed.moved, leaf.cold)
    return Entered(value, refreshed.stored, move, refreshed.overlap)


def leave(factor: Any, plan: LeafPlan, gradient: Any, entered: Entered, direction: Any) -> Any:
    """Lifts the inner direction back to the leaf."""
    if not plan.is_inexact:
        return gradient
    if entered.move is None:
        return direction.astype(plan.dtype)
    return subspace.lift(plan, direction, entered.move.new, factor)


def decide(
    config: LowRankConfig,
    treedef: Any,
    count: jax.Array,
    state: RefreshState,
    leaves: list[LeafSubspace],
    entered: list[Entered],
) -> RefreshState:
    """Which matrices are due at `count`: those the policy names, and those that failed."""
    moves = [leaf.move for leaf in entered]
    moved = [None if move is None else move.moved for move in moves]
    places = _projected_only(leaves, treedef.flatten_up_to(state.places))
    planned, memory = config.refresh.decide(count, places, state.memory, moves)
    due = [
        leaf.due if now is None or soon is None else soon | (leaf.due & ~now)
        for leaf, now, soon in zip(leaves, moved, planned, strict=True)
    ]
    refreshes = [
        leaf.refreshes if now is None else leaf.refreshes + now.astype(jnp.int32)
        for leaf, now in zip(leaves, moved, strict=True)
    ]
    overlaps = map(_latest_overlap, entered, treedef.flatten_up_to(state.overlap))
    return RefreshState(
        due=treedef.unflatten(due),
        refreshes=treedef.unflatten(refreshes),
        overlap=treedef.unflatten(overlaps),
        places=state.places,
        memory=memory,
    )


def _latest_overlap(entered: Entered, known: jax.Array) -> jax.Array:
    """The overlap with the new bases; a first one has nothing in front of it."""
    if entered.move is None or entered.overlap is None:
        return known
    return jnp.where(entered.move.moved & ~entered.move.first, entered.overlap, known)


def first_decision(config: LowRankConfig, treedef: Any, plans: list[LeafPlan]) -> RefreshState:
    """Every matrix is due at count 0."""
    places = places_of([plan.batch_shape if plan.is_projected else None for plan in plans])
    return RefreshState(
        due=treedef.unflatten(jnp.full(plan.batch_shape, plan.is_projected) for plan in plans),
        refreshes=treedef.unflatten(jnp.zeros(plan.batch_shape, jnp.int32) for plan in plans),
        overlap=treedef.unflatten(jnp.zeros(plan.batch_shape, jnp.float32) for plan in plans),
        places=treedef.unflatten(
            jnp.zeros((), jnp.uint32) if place is None else place for place in places
        ),
        memory=config.refresh.init(treedef, places),
    )


def under_policy(
    config: LowRankConfig, state: LowRankState, treedef: Any, leaves: list[LeafSubspace]
) -> RefreshState:
    """The refresh state, without what a policy of another kind remembered."""
    current = state.refresh_state
    if type(config.refresh) is type(state.config.refresh):
        return current
    places = _projected_only(leaves, treedef.flatten_up_to(current.places))
    return current._replace(memory=config.refresh.init(treedef, places))


def _projected_only(leaves: list[LeafSubspace], trees: list[Any]) -> list[Any]:
    return [x if leaf.plan.is_projected else None for leaf, x in zip(leaves, trees, strict=True)]
