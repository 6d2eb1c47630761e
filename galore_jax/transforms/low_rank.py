"""The lens: projects, runs any inner transformation in the subspace, lifts back."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.basis import BasisMove
from galore_jax.codecs import Codec
from galore_jax.keys import matrix_keys
from galore_jax.meshes import sharded_alike
from galore_jax.projectors import Projector
from galore_jax.refresh import MatrixSlots, RefreshPolicy
from galore_jax.transforms import subspace
from galore_jax.transforms.config import LowRankConfig, check_same_storage, low_rank_config
from galore_jax.transforms.inner import at_full_size, check_inner, inner_proxy
from galore_jax.transport import Transport
from galore_jax.views import LeafPlan, ProjectedGradient, leaf_plan
from galore_jax.views.leaves import flatten_leaves, rebox
from galore_jax.views.matrix_view import Side
from galore_jax.views.plan import RankLike
from galore_jax.views.targets import Targets


class RefreshState(NamedTuple):
    """Which matrices are refreshed next, and what the policy remembers.

    Args:
      due: ``bool[*batch]`` per leaf, decided at the end of the previous step.
      refreshes: ``int32[*batch]`` per leaf, how often each basis has been recomputed.
      memory: State of the policy.
    """

    due: optax.Updates
    refreshes: optax.Updates
    memory: Any


class LowRankState(NamedTuple):
    """State of `low_rank_projection`. Every tree has an array at every leaf of the parameters.

    Args:
      config: Static description of the lens (no arrays).
      count: int32 scalar, optimizer steps.
      projectors: Stored basis per leaf, ``[*batch, projected, rank]`` before the codec; a scalar
        zero where a leaf is not projected.
      refresh_state: Which matrices are due.
      inner_state: State of the inner transformation on the low-rank tree.
    """

    config: LowRankConfig
    count: jax.Array  # type: ignore[assignment]  # optax's name for it
    projectors: optax.Updates
    refresh_state: RefreshState
    inner_state: optax.OptState


def low_rank_projection(
    inner: optax.GradientTransformation,
    rank: RankLike,
    *,
    projector: Projector | None = None,
    refresh: RefreshPolicy | int = 200,
    transport: Transport | None = None,
    scale: optax.ScalarOrSchedule = 1.0,
    side: Side = "short",
    axes: Any = None,
    targets: Targets = None,
    codec: Codec | None = None,
    state_dtype: jax.typing.DTypeLike = "float32",
    seed: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs any gradient transformation in a low-rank subspace of each matrix.

    For a matrix gradient :math:`G` with kept and projected axes, and an orthonormal basis
    :math:`P` that is recomputed from time to time,

    .. math::
      R = G P, \qquad N = \mathrm{inner}(R), \qquad \Delta = \alpha\, N P^\top,

    so the state of `inner` has shape ``[*batch, kept, rank]``. Leaves that are not projected go
    through the same `inner` at full size. Knows no learning rate: chain one behind it.

    Args:
      inner: Transformation that runs in the subspace. It gets no ``params``: put weight decay and
        trust ratios behind the lens, in the full space.
      rank: Columns of a basis: an int, a float fraction of the projected dimension, or a
        ``callable(path, leaf) -> int | float | None`` (None: do not project). Leaves whose
        projected dimension it reaches stay at full size.
      projector: How a basis is found; default ``projectors.randomized_svd()``.
      refresh: When; an int n means ``refresh.every(n)``.
      transport: What happens to the inner state when a basis moves; default ``transport.align()``.
      scale: α, a number or a schedule of the step count; projected leaves only.
      side: The matrix axis that is projected: "short" (the paper), "long" (optax.contrib; fewer
        bytes, but an old basis keeps less of the gradient), "input" or "output". Square matrices
        project their input side.
      axes: Which axes form the matrix: None (leaves with two axes), one `MatrixAxes` (all leaves
        with two or more axes), a ``{path regex: MatrixAxes}`` dict, a pytree of `MatrixAxes` and
        None like the parameters (or a prefix), or a callable from parameters to such a pytree.
        Axes not named are batch axes, and each matrix of the batch has its own basis.
      targets: Which leaves take part: None (not embeddings, output head, norms and biases), a
        regex searched in the path, or a ``callable(path, leaf) -> bool``.
      codec: How a basis is stored; default ``codecs.identity()``.
      state_dtype: Floating dtype of what `inner` sees.
      seed: Seed of randomized projectors; None means 0.

    Returns:
      A gradient transformation with a `LowRankState`.

    Raises:
      ValueError: Bad numbers here; bad shapes, axes or an `inner` that needs parameters in
        ``init``; a state made with another rank, side or storage in ``update``.
      TypeError: Arguments of the wrong kind.

    Example:
      >>> import jax.numpy as jnp, optax, galore_jax as gj
      >>> params = {"w": jnp.ones((64, 32)), "b": jnp.ones((32,))}
      >>> tx = optax.chain(
      ...     gj.low_rank_projection(optax.scale_by_lion(), rank=4, refresh=100),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )
      >>> state = tx.init(params)
      >>> state[0].inner_state.mu["w"].shape, state[0].projectors["w"].shape
      ((64, 4), (32, 4))

    References:
      Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024,
      algorithm 2 (https://arxiv.org/abs/2403.03507).
    """
    config = low_rank_config(
        rank,
        projector=projector,
        refresh=refresh,
        transport=transport,
        side=side,
        axes=axes,
        targets=targets,
        codec=codec,
        state_dtype=state_dtype,
        seed=seed,
    )
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> LowRankState:
        plans = leaf_plan(config, params)
        leaves, treedef = flatten_leaves(params)
        proxies = treedef.unflatten(map(functools.partial(inner_proxy, config), plans, leaves))
        inner_state = inner.init(proxies)
        check_inner(inner, inner_state, proxies)
        config.transport.check(inner_state, treedef)
        return LowRankState(
            config=config,
            count=jnp.zeros((), jnp.int32),
            projectors=treedef.unflatten(
                jnp.zeros(()) if plan.view is None else subspace.initial_basis(config, plan)
                for plan in plans
            ),
            refresh_state=RefreshState(
                due=treedef.unflatten(
                    jnp.full(_batch_shape(plan), plan.is_projected) for plan in plans
                ),
                refreshes=treedef.unflatten(
                    jnp.zeros(_batch_shape(plan), jnp.int32) for plan in plans
                ),
                memory=config.refresh.init(treedef, _slots(plans)),
            ),
            inner_state=inner_state,
        )

    def update_fn(
        updates: optax.Updates,
        state: LowRankState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LowRankState]:
        check_same_storage(config, state.config)
        gradients, treedef = flatten_leaves(updates)
        plans = leaf_plan(config, subspace.full_shapes(updates, params))
        per_leaf = map(
            treedef.flatten_up_to,
            (state.projectors, state.refresh_state.due, state.refresh_state.refreshes),
        )
        leaves = [_Leaf(*leaf) for leaf in zip(plans, gradients, *per_leaf, strict=True)]
        for leaf in leaves:
            if leaf.plan.is_projected:
                subspace.check_stored(config, leaf.plan, leaf.stored)
        refreshed = _refresh(config, state.count, leaves)
        entered = list(map(functools.partial(_enter, config), leaves, refreshed))
        carried = config.transport.carry(
            state.inner_state, treedef, [leaf.move for leaf in entered]
        )
        directions, inner_state = inner.update(
            treedef.unflatten(leaf.value for leaf in entered), carried, None, **extra_args
        )
        factor = scale(state.count) if callable(scale) else scale
        left = map(
            functools.partial(_leave, factor),
            plans,
            gradients,
            entered,
            treedef.flatten_up_to(directions),
        )
        count = optax.safe_increment(state.count)
        return rebox(updates, list(left)), LowRankState(
            config=config,
            count=count,
            projectors=treedef.unflatten(leaf.stored for leaf in entered),
            refresh_state=_decide(config, treedef, count, state.refresh_state, leaves, entered),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, sharded_alike(update_fn))


class _Leaf(NamedTuple):
    """One leaf at the start of a step."""

    plan: LeafPlan
    gradient: Any
    stored: Any
    due: jax.Array
    refreshes: jax.Array


class _Entered(NamedTuple):
    """One leaf on its way through the subspace."""

    value: Any  # what the inner transformation sees
    stored: Any
    move: BasisMove | None  # None: not projected


def _refresh(
    config: LowRankConfig, count: jax.Array, leaves: list[_Leaf]
) -> list[subspace.Refreshed | None]:
    """Refreshes all leaves that bring a gradient; equal matrices share one conditional."""
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if leaf.plan.is_projected and not isinstance(leaf.gradient, ProjectedGradient):
            groups.setdefault(_alike(leaf), []).append(i)
    refreshed: list[subspace.Refreshed | None] = [None] * len(leaves)
    for members in groups.values():
        candidates = [
            subspace.Candidate(
                plan=leaves[i].plan,
                gradient=leaves[i].gradient,
                stored=leaves[i].stored,
                due=leaves[i].due,
                cold=leaves[i].refreshes == 0,
                key=matrix_keys(
                    config.seed, count, leaves[i].plan.path, _batch_shape(leaves[i].plan)
                ),
            )
            for i in members
        ]
        for i, result in zip(members, subspace.refresh(config, candidates), strict=True):
            refreshed[i] = result
    return refreshed


def _alike(leaf: _Leaf) -> Any:
    """What two leaves share if they are the same weight of two layers.

    Equal shapes are not enough: a query and an output kernel may be sharded differently, and their
    bases would have to move between devices to be looped over together.
    """
    plan = leaf.plan
    return re.sub(r"\d+", "#", plan.path), plan.view, plan.rank, plan.dtype


def _enter(config: LowRankConfig, leaf: _Leaf, refreshed: subspace.Refreshed | None) -> _Entered:
    """Projects the gradient onto the bases of this step."""
    plan, gradient = leaf.plan, leaf.gradient
    if not plan.is_projected:
        if isinstance(gradient, ProjectedGradient):
            raise ValueError(
                f"leaf {plan.path!r} of shape {plan.shape} is not projected by this lens "
                f"({plan.reason}), but its gradient is a ProjectedGradient: pass the gradient."
            )
        return _Entered(at_full_size(config, plan, gradient), leaf.stored, None)
    old = subspace.decode(config, plan, leaf.stored)
    if refreshed is None:
        refreshed, value = subspace.adopt(config, plan, gradient, leaf.stored)
        new = subspace.decode(config, plan, refreshed.stored)
    else:
        new = subspace.decode(config, plan, refreshed.stored)
        value = subspace.project(config, plan, gradient, new)
    return _Entered(
        value, refreshed.stored, BasisMove(old, new, refreshed.moved, leaf.refreshes == 0)
    )


def _leave(factor: Any, plan: LeafPlan, gradient: Any, entered: _Entered, direction: Any) -> Any:
    """Lifts the inner direction back to the leaf."""
    if not plan.is_inexact:
        return gradient
    if entered.move is None:
        return direction.astype(plan.dtype)
    return subspace.lift(plan, direction, entered.move.new, factor)


def _decide(
    config: LowRankConfig,
    treedef: Any,
    count: jax.Array,
    state: RefreshState,
    leaves: list[_Leaf],
    entered: list[_Entered],
) -> RefreshState:
    """Which matrices are due at `count`: those the policy names, and those that failed."""
    moves = [leaf.move for leaf in entered]
    moved = [None if move is None else move.moved for move in moves]
    slots = _slots([leaf.plan for leaf in leaves])
    planned, memory = config.refresh.decide(count, slots, state.memory, moves)
    due = [
        leaf.due if now is None or soon is None else soon | (leaf.due & ~now)
        for leaf, now, soon in zip(leaves, moved, planned, strict=True)
    ]
    refreshes = [
        leaf.refreshes if now is None else leaf.refreshes + now.astype(jnp.int32)
        for leaf, now in zip(leaves, moved, strict=True)
    ]
    return RefreshState(treedef.unflatten(due), treedef.unflatten(refreshes), memory)


def _batch_shape(plan: LeafPlan) -> tuple[int, ...]:
    return plan.view.batch_shape if plan.view else ()


def _slots(plans: list[LeafPlan]) -> list[MatrixSlots | None]:
    """Numbers the matrices of all leaves through, for policies that spread them."""
    sizes = [plan.view.num_matrices if plan.view else 0 for plan in plans]
    first = itertools.accumulate(sizes, initial=0)
    return [
        MatrixSlots(plan.view.batch_shape, start, sum(sizes)) if plan.view else None
        for plan, start in zip(plans, first, strict=False)
    ]
