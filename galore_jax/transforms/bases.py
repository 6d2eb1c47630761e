"""The refresh of all bases of a lens, under one conditional, and the decision for the next one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.projectors import working_dtype
from galore_jax.refresh import Observation
from galore_jax.transforms import projected, subspace
from galore_jax.transforms.lens import Layer, Lens, together
from galore_jax.transforms.state import LowRankState, RefreshState
from galore_jax.transforms.subspace import LeafSubspace, Refreshed
from galore_jax.views import ProjectedGradient
from galore_jax.views.leaves import Leaves


class _Step(NamedTuple):
    """What a refresh reads.

    Args:
      count: int32 scalar.
      layer: uint32 scalar.
      stored: Stored bases per leaf.
      due: By kind.
      refreshes: By kind.
      gradients: Per leaf; None where it is not projected.
      inner_state: State of the inner transformation, if the transport carries it; or ().
    """

    count: jax.Array
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
    """The bases of this step: those that are due recomputed, under one conditional for all.

    A step on which nothing is due pays for the question alone.
    """
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
@functools.partial(jax.jit, static_argnums=0)
def _refresh(lens: Lens, step: _Step) -> Bases:
    flags = lens.per_leaf(step.due), lens.per_leaf(step.refreshes)
    no_key = jnp.zeros((), jnp.uint32)  # found where it is needed
    leaves = [
        LeafSubspace(*leaf, no_key) for leaf in zip(lens.plans, step.stored, *flags, strict=True)
    ]
    arrived = [i for i, g in enumerate(step.gradients) if isinstance(g, ProjectedGradient)]
    unmoved = {
        i: subspace.unmoved(x.stored, x.due) for i, x in enumerate(leaves) if x.due is not None
    }

    def refreshed() -> Bases:
        found = unmoved | _find(lens, step, leaves)
        return _bases(lens, step, found, _carry(lens, step, leaves, {} if arrived else found))

    def kept() -> Bases:
        return _bases(lens, step, unmoved, step.inner_state)

    if len(arrived) == len(unmoved):
        now = kept()
    else:
        is_due = functools.reduce(jnp.logical_or, map(jnp.any, step.due.values()))
        now = jax.lax.cond(is_due, refreshed, kept)
    if not arrived:
        return now
    # These have a question each, so that nobody's basis depends on another gradient.
    for i in arrived:
        leaf = leaves[i]._replace(key=lens.key(step.count, lens.plans[i], step.layer))
        brought, value = projected.use_projected_gradient(lens.config, leaf, step.gradients[i])
        now = _with_leaf(lens, now, i, brought, value)
    moved = lens.per_leaf(now.moved)
    found = {i: Refreshed(now.stored[i], moved[i], moved[i], moved[i]) for i in unmoved}
    return now._replace(inner_state=_carry(lens, step, leaves, found))


def _find(lens: Lens, step: _Step, leaves: list[LeafSubspace]) -> dict[int, Refreshed]:
    """New bases from the gradients that exist."""
    found: dict[int, Refreshed] = {}
    for members in _alike(lens):
        dense = [i for i in members if not isinstance(step.gradients[i], ProjectedGradient)]
        if dense:
            own = [
                leaves[i]._replace(key=lens.key(step.count, lens.plans[i], step.layer))
                for i in dense
            ]
            matrices = [subspace.dense_matrices(lens.plans[i], step.gradients[i]) for i in dense]
            results = subspace.refresh_due(lens.config, own, matrices)
            found.update(zip(dense, results, strict=True))
    return found


def _carry(lens: Lens, step: _Step, leaves: list[LeafSubspace], found: dict[int, Refreshed]) -> Any:
    """The inner state in the new coordinates."""
    if not lens.config.transport.carries_state or not found:
        return step.inner_state
    changes = [
        subspace.change_of(lens.config, leaf, found[i]) if i in found else None
        for i, leaf in enumerate(leaves)
    ]
    return lens.config.transport.carry(step.inner_state, lens.treedef, changes)


def _with_leaf(lens: Lens, now: Bases, leaf: int, refreshed: Refreshed, value: jax.Array) -> Bases:
    """The bases with those of a leaf replaced whose gradient arrived projected."""
    name, members = next(kind for kind in lens.kinds.items() if leaf in kind[1])
    stored, fields = list(now.stored), {}
    stored[leaf] = refreshed.stored
    for field in ("moved", "overlap", "similarity"):
        flags, own = getattr(now, field), getattr(refreshed, field)
        lone = len(members) == 1
        fields[field] = flags | {
            name: own if lone else flags[name].at[members.index(leaf)].set(own)
        }
    return now._replace(stored=stored, arrived=now.arrived | {leaf: value}, **fields)


def _alike(lens: Lens) -> list[list[int]]:
    """Leaves that are looped over together: equal matrices of one kind.

    Equal shapes are not enough: a query and an output kernel may be sharded differently, and their
    bases would have to move between devices.
    """
    groups: dict[Any, list[int]] = {}
    for name, members in lens.kinds.items():
        for i in members:
            plan = lens.plans[i]
            key = name, plan.view, plan.rank, working_dtype(plan.dtype)
            groups.setdefault(key, []).append(i)
    return list(groups.values())


def _bases(lens: Lens, step: _Step, found: dict[int, Refreshed], inner_state: Any) -> Bases:
    """The bases of all leaves from those that were found."""
    flags = [
        {
            name: together([getattr(found[i], field) for i in members])
            for name, members in lens.kinds.items()
        }
        for field in ("moved", "overlap", "similarity")
    ]
    stored = [found[i].stored if i in found else basis for i, basis in enumerate(step.stored)]
    return Bases(stored, *flags, {}, inner_state)


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
