"""Accumulation of gradients in the subspace."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax import mapped
from galore_jax.meshes import sharded_alike
from galore_jax.transforms import adopted, stages, subspace
from galore_jax.transforms.config import LowRankConfig
from galore_jax.transforms.lenses import find_lenses, lens_leaves
from galore_jax.transforms.state import AccumulateState
from galore_jax.transforms.subspace import LeafSubspace
from galore_jax.views import ProjectedGradient
from galore_jax.views.leaves import abstract, flatten_leaves, leaf_paths, rebox


def accumulate(
    tx: optax.GradientTransformation, every: int
) -> optax.GradientTransformationExtraArgs:
    """Runs a whole optimizer once per window of micro-batches, on their mean gradient.

    Like `optax.MultiSteps`, except that gradients of projected leaves are summed up after their
    projection: the buffers have the size of a moment, and none the size of a matrix. Between the
    ends of windows updates are zero.

    Everything in `tx` runs once per window: schedules, decay and refresh gaps count windows. A
    basis that is due is computed from the first micro-batch of a window and serves all of it. What
    stands in front of a lens in `tx` (a clip by global norm) sees projected gradients; what returns
    its input on some steps (`optax.apply_if_finite`, unlike ours) goes around `accumulate`. Without
    a lens in `tx` all buffers have full size. Also for `layerwise.train_step`.

    With `axis_name`, sums stay local and are reduced once per window; between its ends they differ
    from device to device. Only `jax.shard_map` with ``check_vma``, when told that they do not
    (``out_specs=P()``, a carry that does not vary), has every micro-batch reduced.

    Args:
      tx: The whole optimizer: lens, weight decay, learning rate.
      every: Micro-batches per window, all of the same weight.

    Returns:
      A gradient transformation with an `AccumulateState`, whose `mini_step` is 0 after an update
      that was not zero.

    Raises:
      ValueError: `every` below one. In ``init``: a wrapper in `tx` that belongs around it. In
        ``update``: no `params` although a leaf is projected.
      TypeError: `every` is not an integer.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> params = {"w": jnp.ones((512, 256))}
      >>> tx = gj.accumulate(gj.galore_adamw(1e-2, rank=8), every=4)
      >>> state = tx.init(params)
      >>> state.sums["w"].shape
      (512, 8)
      >>> updates, state = tx.update(params, state, params)
      >>> int(state.mini_step), float(jnp.max(updates["w"]))
      (1, 0.0)
    """
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f"`every` is a number of micro-batches, got {every!r}.")
    if every < 1:
        raise ValueError(f"`every` is at least one micro-batch, got {every}.")
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: optax.Params) -> AccumulateState:
        opt_state = tx.init(params)
        _check_wrappers(opt_state)
        leaves, treedef = flatten_leaves(params)
        projected = _projected(opt_state, params)
        spaces = [projected.get(path) for path in leaf_paths(params)]
        return AccumulateState(
            mini_step=jnp.zeros((), jnp.int32),
            sums=treedef.unflatten(map(_empty_sum, spaces, leaves)),
            projectors=treedef.unflatten(
                # Not the same buffers: they could not be donated twice.
                jax.tree.map(jnp.copy, space.leaf.stored) if space else jnp.zeros(())
                for space in spaces
            ),
            moved=treedef.unflatten(
                jnp.zeros_like(space.leaf.due) if space else jnp.zeros((), bool) for space in spaces
            ),
            opt_state=opt_state,
        )

    def update_fn(
        updates: optax.Updates,
        state: AccumulateState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulateState]:
        like = updates if params is None else params
        shapes = adopted.full_shapes(like, params)
        if params is None:
            _check_nothing_projected(state, shapes)
        window = _add(state, updates, shapes, extra_args.get("layer", 0))
        last = state.mini_step + 1 == every

        def emit() -> tuple[optax.Updates, optax.OptState]:
            mean = _mean(window, updates, shapes, every)
            new_updates, opt_state = tx.update(mean, state.opt_state, params, **extra_args)
            return _cast(new_updates, shapes), opt_state

        def wait() -> tuple[optax.Updates, optax.OptState]:
            return rebox(updates, list(map(_zeros, flatten_leaves(like)[0]))), state.opt_state

        new_updates, opt_state = jax.lax.cond(last, emit, wait)
        return new_updates, window._replace(
            mini_step=jnp.where(last, 0, state.mini_step + 1), opt_state=opt_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, sharded_alike(update_fn, adopted.alike))


class _Projected(NamedTuple):
    """A leaf that some lens projects."""

    config: LowRankConfig
    leaf: LeafSubspace


def _projected(state: Any, params: Any) -> dict[str, _Projected]:
    """The leaves that some lens projects, by path."""
    return {
        leaf.plan.path: _Projected(config, leaf)
        for config, leaves in lens_leaves(state, params)
        for leaf in leaves
        if leaf.plan.is_projected
    }


def _zeros(like: Any) -> jax.Array:
    """Zeros in the shape of a leaf, which vary over the mapped axes that it varies over."""
    part, *_ = jax.tree.leaves(like)
    return jax.lax.full_like(part, 0, abstract(like).dtype, abstract(like).shape)


def _cast(updates: optax.Updates, shapes: Any) -> optax.Updates:
    leaves, _ = flatten_leaves(updates)
    likes = jax.tree.leaves(shapes)
    cast = [leaf.astype(like.dtype) for leaf, like in zip(leaves, likes, strict=True)]
    return rebox(updates, cast)


# They return their input on some steps, or keep sums of it.
_OUTER = (
    optax.ApplyIfFiniteState,
    optax.MultiStepsState,
    optax.transforms.ConditionallyMaskState,
    optax.transforms.ConditionallyTransformState,
)


def _check_wrappers(opt_state: optax.OptState) -> None:
    """Raises if a lens is inside a wrapper that cannot do with projected gradients."""
    for node in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, _OUTER)):
        if isinstance(node, _OUTER) and find_lenses(node):
            raise ValueError(
                f"there is a lens inside a wrapper with state {type(node).__name__}, which would "
                "return projected gradients as updates. Use galore_jax.apply_if_finite, or "
                "wrap the whole instead: optax.apply_if_finite(accumulate(tx, every), ...)."
            )


def _check_nothing_projected(state: AccumulateState, shapes: Any) -> None:
    """Raises if the parameters are needed."""
    if projected := _projected(state, shapes):
        raise ValueError(
            f"leaf {next(iter(projected))!r} is projected, and a sum of projected gradients does "
            "not know the shape of its parameter: pass `params` to update."
        )


def _empty_sum(space: _Projected | None, leaf: Any) -> jax.Array:
    if space is not None:
        assert space.leaf.plan.view is not None
        shape = space.leaf.plan.view.low_rank_shape(space.leaf.plan.rank)
        return jnp.zeros(shape, _wide(space.config.state_dtype))
    like = abstract(leaf)
    if not jnp.issubdtype(like.dtype, jnp.inexact):
        return jnp.zeros(())  # nothing to sum up
    return jnp.zeros(like.shape, _wide(like.dtype))


def _wide(dtype: Any) -> Any:
    """A running sum in 16 bits would lose what it adds."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def _add(
    state: AccumulateState, updates: optax.Updates, shapes: Any, layer: stages.Layer
) -> AccumulateState:
    """The window with one more micro-batch in it."""
    gradients, treedef = flatten_leaves(updates)
    paths = leaf_paths(shapes)
    taken = _take(state, dict(zip(paths, gradients, strict=True)), shapes, layer)
    first = state.mini_step == 0
    trees = (state.sums, state.projectors, state.moved)
    leaves = zip(paths, *map(treedef.flatten_up_to, trees), strict=True)
    sums, projectors, moved = zip(
        *(_one_more(taken[path], first, *leaf) for path, *leaf in leaves), strict=True
    )
    return state._replace(
        sums=treedef.unflatten(sums),
        projectors=treedef.unflatten(projectors),
        moved=treedef.unflatten(moved),
    )


class _Taken(NamedTuple):
    """One leaf of a micro-batch, in the subspace of the window if it has one."""

    value: Any
    stored: Any = None
    moved: jax.Array | None = None
    axis_name: mapped.AxisName = None


def _take(
    state: AccumulateState, gradients: dict[str, Any], shapes: Any, layer: stages.Layer
) -> dict[str, _Taken]:
    """Every gradient, projected where there is a lens that does so, not reduced over devices."""
    taken = {path: _Taken(gradient) for path, gradient in gradients.items()}
    for config, leaves in lens_leaves(state, shapes, layer):
        own = [gradients[leaf.plan.path] for leaf in leaves]
        refreshed = stages.refresh(config, leaves, own)
        for leaf, gradient, result in zip(leaves, own, refreshed, strict=True):
            entered = stages.take(config, leaf, gradient, result)
            taken[leaf.plan.path] = (
                _Taken(gradient, axis_name=config.axis_name)
                if entered.move is None
                else _Taken(entered.value, entered.stored, entered.move.moved, config.axis_name)
            )
    for path, one in taken.items():
        if isinstance(one.value, ProjectedGradient):
            raise ValueError(
                f"leaf {path!r} has a ProjectedGradient, but no lens sees it: pass the gradient."
            )
    return taken


def _one_more(
    taken: _Taken, first: jax.Array, total: jax.Array, stored: Any, moved: jax.Array
) -> tuple[jax.Array, Any, jax.Array]:
    """Sum, bases and what moved, after another micro-batch of the window or the `first`."""
    if jnp.issubdtype(taken.value.dtype, jnp.inexact):
        value = mapped.mean_like(taken.value.astype(total.dtype), total, taken.axis_name)
        total = jnp.where(first, jnp.zeros((), total.dtype), total) + value
    if taken.moved is None:
        return total, stored, moved
    return total, taken.stored, taken.moved | (moved & ~first)


def _mean(window: AccumulateState, updates: optax.Updates, shapes: Any, every: int) -> Any:
    """The mean gradient of a window that is full."""
    gradients, treedef = flatten_leaves(updates)
    paths = leaf_paths(shapes)
    sums, moved = map(treedef.flatten_up_to, (window.sums, window.moved))
    begun = window._replace(mini_step=jnp.ones_like(window.mini_step))
    spaces = _projected(begun, shapes)

    def mean(path: str, gradient: Any, like: Any, total: jax.Array, moved: jax.Array) -> Any:
        if path in spaces:
            config, leaf = spaces[path]
            basis = subspace.decode(config, leaf.plan, leaf.stored)
            return ProjectedGradient(total / every, basis, moved)
        inexact = jnp.issubdtype(like.dtype, jnp.inexact)
        return (total / every).astype(like.dtype) if inexact else gradient

    likes = jax.tree.leaves(shapes)
    return rebox(updates, list(map(mean, paths, gradients, likes, sums, moved)))
