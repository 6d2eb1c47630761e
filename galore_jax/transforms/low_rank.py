"""The lens: projects, runs any inner transformation in the subspace, lifts back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax import collectives
from galore_jax.checks import check_transformation, is_quiet
from galore_jax.codecs import Codec
from galore_jax.collectives import AxisName
from galore_jax.leaves import Leaves, has_masks
from galore_jax.meshes import preserve_sharding
from galore_jax.projectors import Projector
from galore_jax.recovery import Leaving, Recovery
from galore_jax.refresh import RefreshPolicy
from galore_jax.transforms import bases
from galore_jax.transforms.bases import Bases
from galore_jax.transforms.config import LowRankConfig, low_rank_config
from galore_jax.transforms.lens import Layer, Lens, entered, full_shapes
from galore_jax.transforms.projected import updates_like
from galore_jax.transforms.state import LowRankState
from galore_jax.transport import Transport
from galore_jax.views import LeafPlan, ProjectedGradient
from galore_jax.views.matrix_view import Side
from galore_jax.views.notice import check_projection
from galore_jax.views.plan import RankLike
from galore_jax.views.targets import Targets


def low_rank_projection(
    inner: optax.GradientTransformation,
    rank: RankLike,
    *,
    projector: Projector | None = None,
    refresh: RefreshPolicy | int = 200,
    transport: Transport | None = None,
    recovery: Recovery | None = None,
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

    Derivatives of an update, by the learning rate or by earlier parameters, are those of the update
    with its bases as they are. One that would go through a refresh raises when the program runs;
    `jax.lax.stop_gradient` around the gradients, as in first-order methods, leaves it out.

    Args:
      inner: Transformation that runs in the subspace. It gets no ``params``: put weight decay and
        trust ratios behind the lens, in the full space.
      rank: Columns of a basis: an int, a float fraction of the projected dimension, or a
        ``callable(path, leaf) -> int | float | None`` (None: do not project). Leaves whose
        projected dimension it reaches stay at full size.
      projector: How a basis is found; default ``projectors.randomized_svd()``.
      refresh: When; an int n means ``refresh.every(n)``.
      transport: What happens to the inner state when a basis moves; default ``transport.align()``.
      recovery: What becomes of the part of a gradient that its basis leaves out; default
        ``recovery.drop()``.
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
        recovery=recovery,
        side=side,
        axes=axes,
        targets=targets,
        codec=codec,
        state_dtype=state_dtype,
        axis_name=axis_name,
        seed=seed,
    )
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    said: set[str] = set()  # warnings of this transformation, each of them once

    def init_fn(params: optax.Params) -> LowRankState:
        leaves = Leaves.of(params)
        lens = Lens.of(config, leaves.treedef, leaves.shapes)
        if not is_quiet():
            check_projection(list(lens.plans), config, part=has_masks(params), said=said)
        proxies = leaves.tree(
            [lens.at_state_dtype(i, _zeros(lens, i, leaf)) for i, leaf in enumerate(leaves.values)]
        )
        inner_state = inner.init(proxies)
        _check_inner(inner, inner_state, proxies)
        config.transport.check(inner_state, leaves.treedef)
        return LowRankState(
            config=config,
            count=jnp.zeros((), jnp.int32),
            projectors=lens.first_projectors(),
            refresh_state=lens.first_flags(),
            inner_state=inner_state,
            recovery_state=lens.memories([config.recovery.first_memory(p) for p in lens.plans]),
        )

    def update_fn(
        updates: optax.Updates,
        state: LowRankState,
        params: optax.Params | None = None,
        *,
        layer: Layer = 0,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LowRankState]:
        grads = Leaves.of(updates)
        lens = Lens.of(config, grads.treedef, full_shapes(grads, params))
        state = entered(lens, state)
        now = bases.refresh(lens, state, grads, layer)
        low_rank = [_project(lens, now, i, grad) for i, grad in enumerate(grads.values)]
        directions, inner_state = inner.update(
            grads.tree(low_rank), now.inner_state, None, **extra_args
        )
        factor = scale(state.count) if callable(scale) else scale
        lifted, memory = _lift(lens, now, grads, low_rank, directions, state, factor)
        count = optax.safe_increment(state.count)
        return grads.boxed(lifted), LowRankState(
            config=config,
            count=count,
            projectors=grads.tree(now.stored),
            refresh_state=bases.decide(lens, count, state.refresh_state, now, low_rank),
            inner_state=inner_state,
            recovery_state=lens.memories(memory),
        )

    return optax.GradientTransformationExtraArgs(
        init_fn, preserve_sharding(update_fn, updates_like)
    )


def _project(lens: Lens, now: Bases, leaf: int, grad: Any) -> Any:
    """R of a leaf, or the leaf itself where it is not projected: the mean over devices."""
    plan, axis_name = lens.plans[leaf], lens.config.axis_name
    if axis_name is None or not plan.is_inexact:
        return now.project(lens, leaf, grad)
    if plan.is_projected or isinstance(grad, ProjectedGradient):
        return collectives.mean(now.project(lens, leaf, grad), axis_name)
    return now.project(lens, leaf, collectives.mean(grad, axis_name))  # in its own dtype


def _lift(
    lens: Lens,
    now: Bases,
    grads: Leaves,
    low_rank: list[Any],
    directions: Any,
    state: LowRankState,
    scale: Any,
) -> tuple[list[Any], list[Any]]:
    """Updates of all leaves from their directions, and the memory of the recovery."""
    lifted, memory = list(grads.values), lens.memory_of(state.recovery_state)
    for i, direction in enumerate(grads.split(directions)):
        plan = lens.plans[i]
        if plan.view is None:
            if plan.is_inexact:
                lifted[i] = direction.astype(plan.dtype)
            continue
        grad = None
        if lens.config.recovery.needs_gradient:
            grad = _full_gradient(lens.config, plan, grads.values[i])
        basis = now.decoded(lens, i)
        leaving = Leaving(plan.view, plan.dtype, grad, basis, low_rank[i], direction, scale)
        lifted[i], memory[i] = lens.config.recovery.leave(leaving, memory[i])
    return lifted, memory


def _full_gradient(config: LowRankConfig, plan: LeafPlan, grad: Any) -> jax.Array:
    """The mean gradient at full size, which a recovery has asked for."""
    if isinstance(grad, ProjectedGradient):
        raise ValueError(
            f"leaf {plan.path!r}: {config.recovery} needs the gradient itself, but it arrives "
            "projected. Take it with jax.value_and_grad."
        )
    return collectives.mean(grad, config.axis_name)


def _zeros(lens: Lens, leaf: int, value: Any) -> Any:
    """Proxy of a leaf for the init of the inner transformation."""
    if lens.plans[leaf].is_projected or isinstance(value, jax.ShapeDtypeStruct):
        like = lens.low_rank_shape(leaf)
        return jnp.zeros(like.shape, like.dtype)
    return value


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
