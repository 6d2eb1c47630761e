"""The refresh of all bases of a lens, under one conditional, and the decision for the next one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.leaves import Leaves
from galore_jax.projectors import working_dtype
from galore_jax.refresh import Observation
from galore_jax.transforms import projected, subspace
from galore_jax.transforms.lens import Layer, Lens
from galore_jax.transforms.no_derivative import without_derivative
from galore_jax.transforms.state import LowRankState, RefreshState
from galore_jax.transforms.subspace import LeafSubspace, Refreshed
from galore_jax.views import ProjectedGradient


class _Step(NamedTuple):
    """The inputs of a refresh.

    Args:
      count: int32 scalar.
      layer: uint32 scalar.
      stored: Stored bases per leaf.
      due: By kind.
      refreshes: By kind.
      gradients: Per leaf; None where it is not projected.
      inner_state: State of the inner transformation, if the transport carries it; or ().
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name for it
    layer: jax.Array
    stored: list[Any]
    due: dict[str, jax.Array]
    refreshes: dict[str, jax.Array]
    gradients: list[Any]
    inner_state: Any


class Bases(NamedTuple):
    """The bases of this step.

    Args:
      stored: Per leaf.
      moved: By kind, which of them are new.
      overlap: By kind, see `Refreshed`.
      similarity: By kind.
      arrived: R of the leaves whose gradients arrive projected, by their numbers.
      inner_state: Of the inner transformation, carried to the new bases.
    """

    stored: list[Any]
    moved: dict[str, jax.Array]
    overlap: dict[str, jax.Array]
    similarity: dict[str, jax.Array]
    arrived: dict[int, jax.Array]
    inner_state: Any

    def decoded(self, lens: Lens, leaf: int) -> jax.Array:
        """The basis that projects and lifts a leaf."""
        return subspace.decode(lens.config, lens.plans[leaf], self.stored[leaf])

    def project(self, lens: Lens, leaf: int, grad: Any) -> Any:
        """R = G·P of a leaf in the state dtype, or the leaf itself where it is not projected.

        Raises:
          ValueError: A gradient arrives projected that this lens does not project.
        """
        plan, config = lens.plans[leaf], lens.config
        if plan.is_projected:
            if isinstance(grad, ProjectedGradient):
                return self.arrived[leaf]
            return subspace.project(config, plan, grad, self.decoded(lens, leaf))
        if isinstance(grad, ProjectedGradient):
            raise ValueError(
                f"leaf {plan.path!r} of shape {plan.shape} is not projected by this lens "
                f"({plan.reason}), but its gradient is a ProjectedGradient: pass the gradient."
            )
        return lens.at_state_dtype(leaf, grad)


def refresh(lens: Lens, state: LowRankState, grads: Leaves, layer: Layer) -> Bases:
    """The bases of this step, recomputed where they are due, under one conditional for all.

    A step on which nothing is due pays for the question alone.
    """
    if not lens.kinds:
        return Bases(grads.split(state.projectors), {}, {}, {}, {}, state.inner_state)
    carries = lens.config.transport.carries_state
    step = _Step(
        count=state.count,
        layer=jnp.asarray(layer, jnp.uint32),
        stored=grads.split(state.projectors),
        due=state.refresh_state.due,
        refreshes=state.refresh_state.refreshes,
        gradients=[
            grad if plan.is_projected else None
            for plan, grad in zip(lens.plans, grads.values, strict=True)
        ],
        inner_state=state.inner_state if carries else (),
    )
    now = _refresh(lens, step)
    return now if carries else now._replace(inner_state=state.inner_state)


# Compiled once for a lens and its shapes, also where `update` runs outside of a jitted step: the
# closures of a conditional made anew at every call would be compiled anew.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _refresh(lens: Lens, step: _Step) -> Bases:
    no_share = {name: jnp.zeros_like(due, jnp.float32) for name, due in step.due.items()}
    unmoved = {name: jnp.zeros_like(due, bool) for name, due in step.due.items()}
    still = Bases(step.stored, unmoved, no_share, no_share, {}, step.inner_state)
    arrived = [i for i, g in enumerate(step.gradients) if isinstance(g, ProjectedGradient)]

    find = without_derivative(lambda given: _find(lens, *given), _no_derivative(lens))

    def refreshed() -> Bases:
        found = find((step._replace(inner_state=()), still._replace(inner_state=())))
        now = found._replace(inner_state=step.inner_state)
        return now if arrived else _carry(lens, step, now)

    if sum(plan.is_projected for plan in lens.plans) == len(arrived):
        now = still
    else:
        is_due = functools.reduce(jnp.logical_or, map(jnp.any, step.due.values()))
        now = jax.lax.cond(is_due, refreshed, lambda: still)
    if not arrived:
        return now
    # These have a question each, so that nobody's basis depends on another gradient.
    for i in arrived:
        now = _take(lens, step, now, i)
    return _carry(lens, step, now)


def _no_derivative(lens: Lens) -> str:
    names = list(lens.kinds)
    return (
        f"a derivative goes through a refresh of the bases of {names[:3]}"
        f"{'…' if len(names) > 3 else ''}, whose factorization has none here. Pass "
        "jax.lax.stop_gradient(gradients) to update, as first-order methods do."
    )


def _find(lens: Lens, step: _Step, now: Bases) -> Bases:
    """New bases from the gradients that exist.

    Equal matrices of one kind are looped over together. Equal shapes are not enough: a query and an
    output kernel may be sharded differently, and their bases would have to move between devices.
    """
    for name, members in lens.kinds.items():
        groups: dict[Any, list[int]] = {}
        for place, i in enumerate(members):
            if not isinstance(step.gradients[i], ProjectedGradient):
                plan = lens.plans[i]
                key = plan.view, plan.rank, working_dtype(plan.dtype)
                groups.setdefault(key, []).append(place)
        for places in groups.values():
            own, lone = [members[place] for place in places], len(members) == 1
            paths = [lens.plans[i].path for i in own]
            group = LeafSubspace(
                lens.plans[own[0]],
                [step.stored[i] for i in own],
                _taken(step.due[name], places, members),
                _taken(step.refreshes[name], places, members),
                lens.keys(step.count, own[0], paths[0] if lone else paths, step.layer),
            )
            gradients = [step.gradients[i] for i in own]
            matrices = subspace.dense_matrices(group.plan, gradients)
            now = _put(
                now, name, places, members, subspace.refresh_due(lens.config, group, matrices)
            )
    return now


def _take(lens: Lens, step: _Step, now: Bases, leaf: int) -> Bases:
    """The bases of a leaf whose gradient arrives projected."""
    name, members = next(kind for kind in lens.kinds.items() if leaf in kind[1])
    place, plan = members.index(leaf), lens.plans[leaf]
    due, refreshes = (lens.per_leaf(x)[leaf] for x in (step.due, step.refreshes))
    key = lens.keys(step.count, leaf, plan.path, step.layer)
    space = LeafSubspace(plan, step.stored[leaf], due, refreshes, key)
    brought, value = projected.use_projected_gradient(lens.config, space, step.gradients[leaf])
    one = Refreshed([brought.stored], *(_as_part(x, members) for x in brought[1:]))
    return _put(now, name, [place], members, one)._replace(arrived=now.arrived | {leaf: value})


def _carry(lens: Lens, step: _Step, now: Bases) -> Bases:
    """The bases with the inner state in the new coordinates."""
    if not lens.config.transport.carries_state:
        return now
    flags = lens.per_leaf(now.moved), lens.per_leaf(step.refreshes)
    changes = [
        subspace.change_of(lens.config, plan, old, new, moved, refreshes == 0)
        if plan.is_projected
        else None
        for plan, old, new, moved, refreshes in zip(
            lens.plans, step.stored, now.stored, *flags, strict=True
        )
    ]
    carried = lens.config.transport.carry(step.inner_state, lens.treedef, changes)
    return now._replace(inner_state=carried)


def _put(now: Bases, name: str, places: list[int], members: list[int], new: Refreshed) -> Bases:
    """The bases with those of some leaves of one kind replaced."""
    stored = list(now.stored)
    for place, basis in zip(places, new.stored, strict=True):
        stored[members[place]] = basis
    fields = {}
    for field in ("moved", "overlap", "similarity"):
        flags, own = getattr(now, field), getattr(new, field)
        if len(places) < len(members):
            own = flags[name].at[np.asarray(places)].set(own)
        fields[field] = flags | {name: own}
    return now._replace(stored=stored, **fields)


def _taken(flags: jax.Array, places: list[int], members: list[int]) -> jax.Array:
    """Flags of some leaves of a kind."""
    return flags if len(places) == len(members) else flags[np.asarray(places)]


def _as_part(flags: jax.Array, members: list[int]) -> jax.Array:
    """Flags of one leaf, as a part of those of its kind."""
    return flags if len(members) == 1 else flags[None]


def decide(
    lens: Lens, count: jax.Array, flags: RefreshState, bases: Bases, low_rank: Sequence[Any]
) -> RefreshState:
    """Flags for the step at `count`: due is what the policy names, and what failed.

    Args:
      lens: The lens.
      count: int32 scalar, the count of the step that comes next.
      flags: Those of this step.
      bases: The bases of this step.
      low_rank: Per leaf what entered the inner transformation.
    """
    after: dict[str, list[Any]] = {}
    for name, members in lens.kinds.items():
        moved = bases.moved[name]
        refreshes = flags.refreshes[name] + moved.astype(jnp.int32)
        compared = moved & (refreshes > 1)  # the initial basis means nothing
        values = tuple(low_rank[i] for i in members)
        seen = Observation(moved, compared, refreshes, bases.similarity[name], values)
        planned, memory = lens.config.refresh.decide(count, flags.memory[name], seen)
        overlap = jnp.where(compared, bases.overlap[name], flags.overlap[name])
        after[name] = [planned | (flags.due[name] & ~moved), refreshes, overlap, memory]
    if not after:
        return flags
    return RefreshState(*({name: fields[i] for name, fields in after.items()} for i in range(4)))
