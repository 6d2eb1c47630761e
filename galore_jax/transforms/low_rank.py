"""The lens: projects, runs any inner transformation in the subspace, lifts back."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.codecs import Codec
from galore_jax.projectors import Projector
from galore_jax.refresh import MatrixSlots, RefreshPolicy
from galore_jax.transforms import subspace
from galore_jax.transforms.config import LowRankConfig, check_same_storage, low_rank_config
from galore_jax.transport import BasisMove, Transport
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
    count: jax.Array
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
    state_dtype: jax.typing.DTypeLike = jnp.float32,
    seed: int = 0,
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
      seed: Seed of randomized projectors.

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
        proxies = treedef.unflatten(map(functools.partial(_inner_proxy, config), plans, leaves))
        inner_state = inner.init(proxies)
        _check_inner(inner, inner_state, proxies)
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
        plans = leaf_plan(config, _full_shapes(updates, params))
        refresh_state = state.refresh_state
        entered = [
            _enter(config, state.count, *leaf)
            for leaf in zip(
                plans,
                gradients,
                treedef.flatten_up_to(state.projectors),
                treedef.flatten_up_to(refresh_state.due),
                treedef.flatten_up_to(refresh_state.refreshes),
                strict=True,
            )
        ]
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
            refresh_state=_decide(config, plans, treedef, count, refresh_state, entered),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Entered(NamedTuple):
    """One leaf on its way through the subspace."""

    value: Any  # what the inner transformation sees
    stored: Any
    move: BasisMove | None  # None: not projected


def _enter(
    config: LowRankConfig,
    count: jax.Array,
    plan: LeafPlan,
    gradient: Any,
    stored: Any,
    due: jax.Array,
    refreshes: jax.Array,
) -> _Entered:
    """Refreshes, if due, and projects."""
    if not plan.is_projected:
        return _Entered(_at_full_size(config, plan, gradient), stored, None)
    old = subspace.decode(config, plan, stored)
    if isinstance(gradient, ProjectedGradient):
        refreshed, value = subspace.adopt(config, plan, gradient, stored)
        new = subspace.decode(config, plan, refreshed.stored)
    else:
        refreshed = subspace.refresh(
            config, plan, gradient, stored, due=due, cold=refreshes == 0, count=count
        )
        new = subspace.decode(config, plan, refreshed.stored)
        value = subspace.project(config, plan, gradient, new)
    return _Entered(value, refreshed.stored, BasisMove(old, new, refreshed.moved))


def _leave(factor: Any, plan: LeafPlan, gradient: Any, entered: _Entered, direction: Any) -> Any:
    """Lifts the inner direction back to the leaf."""
    if not plan.is_inexact:
        return gradient
    if entered.move is None:
        return direction.astype(plan.dtype)
    return subspace.lift(plan, direction, entered.move.new, factor)


def _decide(
    config: LowRankConfig,
    plans: list[LeafPlan],
    treedef: Any,
    count: jax.Array,
    state: RefreshState,
    entered: list[_Entered],
) -> RefreshState:
    """Which matrices are due at `count`: those the policy names, and those that failed."""
    moved = [leaf.move and leaf.move.moved for leaf in entered]
    planned, memory = config.refresh.decide(count, _slots(plans), state.memory, moved)
    due, refreshes = (treedef.flatten_up_to(tree) for tree in (state.due, state.refreshes))
    for i, leaf_moved in enumerate(moved):
        if leaf_moved is not None:
            due[i] = planned[i] | (due[i] & ~leaf_moved)
            refreshes[i] = refreshes[i] + leaf_moved
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


def _inner_proxy(config: LowRankConfig, plan: LeafPlan, leaf: Any) -> Any:
    """What the inner transformation is initialised on."""
    if plan.view is not None:
        return jnp.zeros(plan.view.low_rank_shape(plan.rank), config.state_dtype)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        leaf = jnp.zeros(leaf.shape, leaf.dtype)
    return _at_full_size(config, plan, leaf)


def _at_full_size(config: LowRankConfig, plan: LeafPlan, leaf: Any) -> Any:
    if not plan.is_inexact:
        return optax.MaskedNode()  # integers are nothing an optimizer can average
    if jnp.issubdtype(plan.dtype, jnp.complexfloating):
        return leaf
    return jnp.asarray(leaf).astype(config.state_dtype)


def _full_shapes(updates: optax.Updates, params: optax.Params | None) -> Any:
    """Shapes of the leaves; those of projected gradients are read off the parameters."""
    leaves, treedef = flatten_leaves(updates)
    if any(isinstance(leaf, ProjectedGradient) for leaf in leaves):
        if params is None:
            raise ValueError(
                "a ProjectedGradient does not know the shape of its parameter: pass `params` to "
                "update."
            )
        leaves, treedef = flatten_leaves(params)
    return treedef.unflatten(
        jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves
    )


def _check_inner(inner: optax.GradientTransformationExtraArgs, state: Any, proxies: Any) -> None:
    """Raises if `inner` needs parameters, which do not exist in the subspace."""

    def fails(params: Any) -> Exception | None:
        try:
            jax.eval_shape(lambda *args: inner.update(*args), proxies, state, params)
        except Exception as error:
            return error
        return None

    error = fails(None)
    # Failing with parameters too means that it misses something else (extra arguments, say).
    if error is not None and fails(proxies) is None:
        raise ValueError(
            "the inner transformation needs `params`, which live in the full space, not in the "
            "subspace. Put it behind the lens, e.g. optax.chain(low_rank_projection("
            "optax.scale_by_adam(), rank), optax.add_decayed_weights(1e-2)) instead of an AdamW "
            "inside."
        ) from error
