"""Whether a transformation can be applied to one block before the gradients of the others exist."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from galore_jax.layerwise.reach import POSITION, RANDOM, Reach, reach
from galore_jax.layerwise.slices import LayerAxes, at_depth, num_layers, same_structure
from galore_jax.transforms import AccumulateState, LowRankState
from galore_jax.transforms.lenses import find_lenses

_REMEDIES = (
    "A layer-wise step updates a block before the other gradients exist. Instead of "
    "optax.clip_by_global_norm pass clip_norm= to train_step (exact; walks the blocks backwards "
    "twice), or chain layerwise.clip_by_previous_norm (free). Instead of optax.apply_if_finite "
    "leave skip_nonfinite=True. What takes a statistic of a whole leaf (clip_by_block_rms, trust "
    "ratios) is applied to each layer by itself with layers_alone=True. Anything else needs an "
    "ordinary step."
)


# Number of the layer, global norm.
_SCALARS = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32))


class Reads(NamedTuple):
    """Which gradients enter the results of an update.

    Args:
      updates: Per leaf of the updates, by its path, the paths of the gradients.
      state: The same per array of the new state, in order.
    """

    updates: dict[str, frozenset[str]]
    state: tuple[frozenset[str], ...]


@dataclasses.dataclass(frozen=True)
class _Place:
    """An array of a gradient, parameter or state tree.

    Args:
      name: For messages.
      axis: Its layer axis, if it has one.
    """

    name: str
    axis: int | None


def check_uncoupled(
    tx: optax.GradientTransformationExtraArgs,
    params: Any,
    state_axes: LayerAxes,
    *,
    blocks: str,
    layers_alone: bool,
) -> Reads:
    """Makes sure that a block can be updated when only its own gradient is there.

    Looks at the traced program of ``tx.update``, on a step on which no basis moves: bases are found
    and taken over matrix by matrix, but under one condition for all of them.

    Args:
      tx: The transformation.
      params: The parameters, or their shapes.
      state_axes: The layer axes of its state.
      blocks: Name of the stacked layers.
      layers_alone: Whether layers of one leaf may depend on each other.

    Returns:
      Which gradients enter which results.

    Raises:
      ValueError: An update or state of one block depends on the gradient of anything else, or vice
        versa. Names both.
    """
    layers = num_layers(params, blocks)
    shapes = at_depth(params, blocks, layers)
    state = jax.eval_shape(tx.init, shapes)
    traced, (updates, new_state) = jax.make_jaxpr(
        lambda layer, norm, *trees: tx.update(*trees, layer=layer, grad_norm=norm),
        return_shape=True,
    )(*_SCALARS, shapes, state, params)
    check_unchanged(state, new_state)
    _check_lenses_see_the_layer(state, traced.jaxpr)

    gradients, results = _places(shapes, blocks), _places(updates, blocks)
    names = [f"the state {name!r}" for name in _names(state)]
    states = [_Place(name, axis) for name, axis in zip(names, state_axes.axes, strict=True)]
    found = reach(
        traced.jaxpr,
        [
            *(Reach() for _ in _SCALARS),
            *map(_gradient, gradients),
            *map(_read, states, _is_moving(state)),
            *map(_read, _places(params, blocks)),
        ],
        layers,
    )
    alone = layers_alone or layers == 1
    for place, result in zip(results + states, found, strict=True):
        problem = _outside(result) if place.axis is None else _inside(place, result, alone)
        if problem:
            subject = place.name if place in states else f"the update of {place.name!r}"
            raise ValueError(f"{subject} depends on {problem}. {_REMEDIES}")
    known = {place.name for place in gradients}
    reads = [(result.layers | result.outside) & known for result in found]
    by_leaf = {place.name: read for place, read in zip(results, reads, strict=False)}
    return Reads(by_leaf, tuple(reads[len(results) :]))


def check_unchanged(old: Any, new: Any) -> None:
    """Raises unless two states have the same structure, shapes and dtypes."""
    if not same_structure(old, new):
        raise ValueError(
            "the update changes the structure of the optimizer state, or `opt_state` is not "
            f"tx.init(params):\n{jax.tree.structure(old)}\n{jax.tree.structure(new)}"
        )
    for name, a, b in zip(_names(old), jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if (jnp.shape(a), jnp.result_type(a)) != (jnp.shape(b), jnp.result_type(b)):
            raise ValueError(
                f"the optimizer state {name!r} is {jnp.result_type(a)}{list(jnp.shape(a))} on one "
                f"side and {jnp.result_type(b)}{list(jnp.shape(b))} on the other: `opt_state` is "
                "not tx.init(params), or an update changes it."
            )


def _check_lenses_see_the_layer(state: Any, jaxpr: core.Jaxpr) -> None:
    """Raises if a wrapper keeps the extra argument `layer` from the lenses inside it."""
    layer = jaxpr.invars[0]
    used = any(layer is atom for eqn in jaxpr.eqns for atom in eqn.invars)
    bases = [x for lens in find_lenses(state) for x in jax.tree.leaves(lens.projectors)]
    if any(x.ndim for x in bases) and not used:
        raise ValueError(
            "the lens does not learn the number of the layer, because a transformation around it "
            "drops extra arguments. Make that one an optax.GradientTransformationExtraArgs that "
            "passes them on; for optax.MultiSteps: "
            "optax.GradientTransformationExtraArgs(steps.init, steps.update)."
        )


def _inside(place: _Place, result: Reach, alone: bool) -> str | None:
    """What a result of one block must not depend on."""
    if RANDOM in result.outside:
        return (
            "random numbers drawn for all layers at once, which a slice of one layer would draw "
            "differently"
        )
    if POSITION in result.outside:
        return (
            "the number of the layer (a jnp.arange over the layers), which a slice of one layer "
            "does not show; the extra argument `layer` of update does"
        )
    if result.outside:
        return f"the gradient of {_listed(result.outside)}, outside the blocks"
    aligned = result.axis == place.axis and result.start is None
    if result.layers and not aligned and not alone:
        return f"other layers of {_listed(result.layers)}"
    return None


def _outside(result: Reach) -> str | None:
    """What a result outside the blocks must not depend on."""
    return f"{_listed(result.layers)}, which is in the blocks" if result.layers else None


def _gradient(place: _Place) -> Reach:
    if place.axis is None:
        return Reach(outside=frozenset([place.name]))
    return Reach(layers=frozenset([place.name]), axis=place.axis)


def _read(place: _Place, zero: bool = False) -> Reach:
    """State or parameters: those outside the blocks are there all the time."""
    if place.axis is None or zero:
        return Reach(zero=zero)
    return Reach(layers=frozenset([place.name]), axis=place.axis)


def _places(tree: Any, blocks: str) -> list[_Place]:
    inside = jax.tree.leaves({k: jax.tree.map(lambda _, k=k: k == blocks, tree[k]) for k in tree})
    return [_Place(n, 0 if own else None) for n, own in zip(_names(tree), inside, strict=True)]


def _is_moving(state: Any) -> list[bool]:
    """Per array of a state whether it says that a basis is to be refreshed, or has been."""

    def mark(node: Any) -> Any:
        marked = jax.tree.map(lambda _: False, node)
        if isinstance(node, LowRankState):
            due = jax.tree.map(lambda _: True, node.refresh_state.due)
            return marked._replace(refresh_state=marked.refresh_state._replace(due=due))
        if isinstance(node, AccumulateState):
            moved = jax.tree.map(lambda _: True, node.moved)
            return marked._replace(moved=moved, opt_state=marks(node.opt_state))
        return marked

    def marks(tree: Any) -> Any:
        known = (LowRankState, AccumulateState)
        return jax.tree.map(mark, tree, is_leaf=lambda node: isinstance(node, known))

    return jax.tree.leaves(marks(state))


def _names(tree: Any) -> list[str]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def _listed(names: Sequence[str] | frozenset[str]) -> str:
    first, *rest = sorted(names)
    return f"{first!r}" + (f" (and {len(rest)} more)" if rest else "")
