"""Accumulation of gradients in the subspace."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax import collectives
from galore_jax.checks import check_count, check_transformation
from galore_jax.leaves import Leaves, abstract
from galore_jax.meshes import preserve_sharding
from galore_jax.transforms import bases, subspace
from galore_jax.transforms.compiled import compiled_once
from galore_jax.transforms.lens import Layer, Lens, check_alike, entered, for_each_leaf, full_shapes
from galore_jax.transforms.lenses import current_lenses, settled, with_lost_configs
from galore_jax.transforms.projected import updates_like
from galore_jax.transforms.state import AccumulateState, check_state, low_rank_states
from galore_jax.views import ProjectedGradient


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
    every = check_count("every", every)
    check_transformation("tx", tx)
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: optax.Params) -> AccumulateState:
        opt_state, leaves = tx.init(params), Leaves.of(params)
        _check_wrappers(opt_state)
        spaces = _spaces(opt_state, leaves)
        return AccumulateState(
            mini_step=jnp.zeros((), jnp.int32),
            sums=leaves.tree(list(map(_empty_sum, spaces, leaves.shapes))),
            projectors=leaves.tree(
                # Copies: the same buffers could not be donated twice.
                [jax.tree.map(jnp.copy, s.stored) if s.lens else jnp.zeros(()) for s in spaces]
            ),
            moved=leaves.tree([jnp.zeros(space.batch_shape, bool) for space in spaces]),
            opt_state=opt_state,
        )

    def update_fn(
        updates: optax.Updates,
        state: AccumulateState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulateState]:
        check_state("accumulate", state, AccumulateState)
        grads = Leaves.of(updates)
        if params is not None:
            check_alike(grads, Leaves.of(params))
        own = full_shapes(grads, params)
        for_each_leaf(grads.treedef, state.sums)
        before = with_lost_configs(state.opt_state, tx, updates, params)
        state = _settled(state._replace(opt_state=before))
        shapes = Leaves.of(grads.tree(own if params is None else Leaves.of(params).shapes))
        spaces = _spaces(state.opt_state, shapes)
        if params is None:
            _check_nothing_projected(shapes, spaces)
        window = _add(state, grads, shapes, extra_args.get("layer", 0))
        is_last = state.mini_step + 1 == every

        # Traced once, although its result is asked for twice.
        @functools.partial(jax.jit, inline=True)
        def emit() -> tuple[optax.Updates, optax.OptState]:
            mean = _mean(window, spaces, grads, every)
            new_updates, opt_state = tx.update(mean, state.opt_state, params, **extra_args)
            new = Leaves.of(new_updates).values
            cast = [x.astype(like.dtype) for x, like in zip(new, shapes.values, strict=True)]
            return grads.boxed(cast), opt_state

        def wait() -> tuple[optax.Updates, optax.OptState]:
            likes = grads.values if params is None else Leaves.of(params).values
            zeros = list(map(_zeros, likes, shapes.values))
            return grads.boxed(zeros), settled(state.opt_state, jax.eval_shape(emit)[1])

        new_updates, opt_state = jax.lax.cond(is_last, emit, wait)
        return new_updates, window._replace(
            mini_step=jnp.where(is_last, 0, state.mini_step + 1), opt_state=opt_state
        )

    return optax.GradientTransformationExtraArgs(
        init_fn, preserve_sharding(compiled_once(update_fn), updates_like)
    )


def _settled(state: AccumulateState) -> AccumulateState:
    """A state whose counts and flags are of their kind: it may have been averaged or cast."""
    return state._replace(
        mini_step=state.mini_step.astype(jnp.int32),
        moved=jax.tree.map(lambda x: x.astype(bool), state.moved),
    )


class _Space(NamedTuple):
    """A leaf in the lens that projects it, or at full size where there is none.

    Args:
      lens: That lens, or None.
      number: Of the leaf in it.
      stored: Its bases at the start of a window.
    """

    lens: Lens | None = None
    number: int = 0
    stored: Any = None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.lens.plans[self.number].batch_shape if self.lens else ()


def _spaces(opt_state: Any, leaves: Leaves) -> list[_Space]:
    """The space of every leaf."""
    spaces = [_Space()] * len(leaves.values)
    for state, lens, owners in current_lenses(opt_state, leaves):
        stored = lens.treedef.flatten_up_to(state.projectors)
        for number, owner in enumerate(owners):
            if lens.plans[number].is_projected:
                spaces[owner] = _Space(lens, number, stored[number])
    return spaces


def _empty_sum(space: _Space, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    like = space.lens.low_rank_shape(space.number) if space.lens else leaf
    if not jnp.issubdtype(like.dtype, jnp.inexact):
        return jnp.zeros(())  # nothing to sum up
    # A running sum in 16 bits would lose what it adds.
    narrow = jnp.finfo(like.dtype).bits < 32
    return jnp.zeros(like.shape, jnp.float32 if narrow else like.dtype)


def _zeros(leaf: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros in the shape of a leaf, which vary over the mapped axes that it varies over."""
    part, *_ = jax.tree.leaves(leaf)
    return jax.lax.full_like(part, 0, like.dtype, abstract(leaf).shape)


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
        if isinstance(node, _OUTER) and low_rank_states(node):
            raise ValueError(
                f"there is a lens inside a wrapper with state {type(node).__name__}, which would "
                "return projected gradients as updates. Use galore_jax.apply_if_finite, or "
                "wrap the whole instead: optax.apply_if_finite(accumulate(tx, every), ...)."
            )


def _check_nothing_projected(shapes: Leaves, spaces: list[_Space]) -> None:
    """Raises if the parameters are needed."""
    for path, space in zip(shapes.paths, spaces, strict=True):
        if space.lens:
            raise ValueError(
                f"leaf {path!r} is projected, and a sum of projected gradients does not know the "
                "shape of its parameter: pass `params` to update."
            )


def _add(state: AccumulateState, grads: Leaves, shapes: Leaves, layer: Layer) -> AccumulateState:
    """The window with one more micro-batch in it, not reduced over devices."""
    first = state.mini_step == 0
    sums, stored, moved = (grads.split(x) for x in (state.sums, state.projectors, state.moved))
    values = list(grads.values)
    axis_names: list[collectives.AxisName] = [None] * len(values)
    for begun, lens, owners in current_lenses(state, shapes):
        own = Leaves.of(lens.treedef.unflatten([grads.values[owner] for owner in owners]))
        begun = entered(lens, begun)._replace(inner_state=())
        now = bases.refresh(lens, begun, own, layer)
        new = lens.per_leaf(now.moved)
        for number, owner in enumerate(owners):
            axis_names[owner] = lens.config.axis_name
            if lens.plans[number].is_projected:
                values[owner] = now.project(lens, number, grads.values[owner])
                stored[owner] = now.stored[number]
                moved[owner] = new[number] | (moved[owner] & ~first)
    for i, value in enumerate(values):
        if isinstance(value, ProjectedGradient):
            raise ValueError(
                f"leaf {grads.paths[i]!r} has a ProjectedGradient, but no lens projects it: pass "
                "the gradient."
            )
        if jnp.issubdtype(value.dtype, jnp.inexact):
            value = collectives.pmean_unvarying(value.astype(sums[i].dtype), sums[i], axis_names[i])
            sums[i] = jnp.where(first, jnp.zeros((), sums[i].dtype), sums[i]) + value
    trees = {"sums": sums, "projectors": stored, "moved": moved}
    return state._replace(**{name: grads.tree(leaves) for name, leaves in trees.items()})


def _mean(window: AccumulateState, spaces: list[_Space], grads: Leaves, every: int) -> Any:
    """The mean gradient of a window that is full."""
    sums, stored, moved = (grads.split(x) for x in (window.sums, window.projectors, window.moved))
    means = list(grads.values)
    for i, space in enumerate(spaces):
        if space.lens:
            plan = space.lens.plans[space.number]
            basis = subspace.decode(space.lens.config, plan, stored[i])
            means[i] = ProjectedGradient(sums[i] / every, basis, moved[i])
        elif jnp.issubdtype(means[i].dtype, jnp.inexact):
            means[i] = (sums[i] / every).astype(means[i].dtype)
    return grads.boxed(means)
