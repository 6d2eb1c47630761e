"""The lens: projects, runs any inner transformation in the subspace, lifts back."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.codecs import Codec
from galore_jax.mapped import AxisName
from galore_jax.meshes import sharded_alike
from galore_jax.projectors import Projector
from galore_jax.refresh import RefreshPolicy
from galore_jax.transforms import adopted, stages, subspace
from galore_jax.transforms.config import check_same_storage, low_rank_config
from galore_jax.transforms.inner import check_inner, inner_proxy
from galore_jax.transforms.state import LowRankState
from galore_jax.transport import Transport
from galore_jax.views import leaf_plan
from galore_jax.views.leaves import flatten_leaves, rebox
from galore_jax.views.matrix_view import Side
from galore_jax.views.plan import RankLike
from galore_jax.views.targets import Targets


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
    axis_name: AxisName = None,
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
      axis_name: Mapped axes (of `jax.shard_map` or `jax.pmap`) over which gradients are still
        local. What is averaged over them are low-rank arrays, and sketches on a refresh; leaves
        that are not projected are averaged at full size.
      seed: Seed of randomized projectors; None means 0.

    Returns:
      A gradient transformation with a `LowRankState`. Its ``update`` takes `ProjectedGradient`s as
      well, and an extra argument ``layer``: the number of the layer, when gradients and state are
      slices of one layer out of a stack (with an axis of size one).

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
        axis_name=axis_name,
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
                subspace.initial_basis(config, plan) if plan.is_projected else jnp.zeros(())
                for plan in plans
            ),
            refresh_state=stages.first_decision(config, treedef, plans),
            inner_state=inner_state,
        )

    def update_fn(
        updates: optax.Updates,
        state: LowRankState,
        params: optax.Params | None = None,
        *,
        layer: stages.Layer = 0,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LowRankState]:
        check_same_storage(config, state.config)
        gradients, treedef = flatten_leaves(updates)
        plans = leaf_plan(config, adopted.full_shapes(updates, params))
        leaves = stages.subspaces(state._replace(config=config), treedef, plans, layer)
        for leaf in leaves:
            if leaf.plan.is_projected:
                subspace.check_stored(config, leaf.plan, leaf.stored)
        refreshing = stages.under_policy(config, state, treedef, leaves)
        refreshed = stages.refresh(config, leaves, gradients)
        entered = list(map(functools.partial(stages.enter, config), leaves, gradients, refreshed))
        carried = config.transport.carry(
            state.inner_state, treedef, [leaf.move for leaf in entered]
        )
        directions, inner_state = inner.update(
            treedef.unflatten(leaf.value for leaf in entered), carried, None, **extra_args
        )
        factor = scale(state.count) if callable(scale) else scale
        left = map(
            functools.partial(stages.leave, factor),
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
            refresh_state=stages.decide(config, treedef, count, refreshing, leaves, entered),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, sharded_alike(update_fn, adopted.alike))
