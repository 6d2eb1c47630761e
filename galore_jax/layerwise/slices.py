"""The layer axis of every array of a training state, and one layer of it.

A slice keeps the axis, with size one: axes that somebody named, and codes in blocks, mean the same
in it as in the whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.checks import quietly
from galore_jax.leaves import Leaves, abstract, is_one_leaf
from galore_jax.quant import QuantizedArray


class Layer(NamedTuple):
    """Parameters and optimizer state: the whole, or of the stacked arrays one layer."""

    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class LayerAxes:
    """The layer axis of every array of a tree.

    Args:
      treedef: Structure of the tree.
      axes: Per array its layer axis; None for an array that all layers share.
    """

    treedef: Any
    axes: tuple[int | None, ...]

    def stacked(self, tree: Any) -> list[jax.Array]:
        """The arrays with the layer axis."""
        leaves = self.treedef.flatten_up_to(tree)
        return [x for x, axis in zip(leaves, self.axes, strict=True) if axis is not None]

    def joined(self, tree: Any, stacked: Sequence[jax.Array]) -> Any:
        """`tree` with these arrays in the places of its `stacked` ones."""
        given = iter(stacked)
        leaves = self.treedef.flatten_up_to(tree)
        return self.treedef.unflatten(
            x if axis is None else next(given) for x, axis in zip(leaves, self.axes, strict=True)
        )

    def cut(self, stacked: Sequence[jax.Array], layer: jax.Array | int) -> list[jax.Array]:
        """One layer of each array."""
        return [
            jax.lax.dynamic_slice_in_dim(x, layer, 1, axis)
            for x, axis in zip(stacked, self._known(), strict=True)
        ]

    def paste(
        self, stacked: Sequence[jax.Array], parts: Sequence[jax.Array], layer: jax.Array
    ) -> list[jax.Array]:
        """The arrays with one layer replaced."""
        return [
            jax.lax.dynamic_update_slice_in_dim(x, part, layer, axis)
            for x, part, axis in zip(stacked, parts, self._known(), strict=True)
        ]

    def slice(self, tree: Any, layer: jax.Array | int) -> Any:
        """`tree` with one layer of each array that has the axis."""
        return self.joined(tree, self.cut(self.stacked(tree), layer))

    def _known(self) -> list[int]:
        return [axis for axis in self.axes if axis is not None]


def layer_axes(
    tx: optax.GradientTransformation, whole: Layer, blocks: str, inside: list[bool]
) -> LayerAxes:
    """The layer axes of parameters and state: those of the state from two numbers of layers.

    Args:
      tx: The optimizer.
      whole: Parameters, stacked along the first axis under `blocks`, and ``tx.init`` of them.
      blocks: Name of the stacked layers.
      inside: Per leaf of the parameters, whether it is one of them.

    Raises:
      ValueError: The state is of other parameters, or it does not grow with the number of layers as
        a stack does.
      TypeError: A parameter has no gradient.
    """
    params, opt_state = whole
    layers = num_layers(params, blocks)
    leaves = Leaves.of(params)
    _check_floating(leaves)
    with quietly():
        here = jax.eval_shape(tx.init, _at_depth(params, blocks, layers))
        there, change = jax.eval_shape(tx.init, _at_depth(params, blocks, layers + 1)), 1
        if layers > 1 and not _same_structure(here, there):
            # A threshold on the size of a leaf (8-bit moments have one) may lie in between.
            there, change = jax.eval_shape(tx.init, _at_depth(params, blocks, layers - 1)), -1
    if not _same_structure(here, there):
        raise ValueError(
            "the structure of the optimizer state changes with the number of layers (something is "
            "stored in blocks that run along the layer axis, perhaps), so that it cannot be cut "
            f"into layers:\n{jax.tree.structure(here)}\n{jax.tree.structure(there)}"
        )
    check_unchanged(here, opt_state)
    pairs = zip(inside, leaves.values, strict=True)
    axes = [0 if own else None for own, x in pairs for _ in parts(x)]
    grown = [
        _grown(name, one.shape, other.shape, layers, layers + change)
        for name, one, other in zip(paths_of(here), parts(here), parts(there), strict=True)
    ]
    _check_parts(here, grown)
    return LayerAxes(jax.tree.structure(whole), (*axes, *grown))


def _check_parts(state: Any, axes: list[int | None]) -> None:
    """Raises if a stored array has some parts per layer, and others that all layers share."""
    rest = iter(zip(paths_of(state), axes, strict=True))
    for node in jax.tree.leaves(state, is_leaf=is_one_leaf):
        own = [next(rest) for _ in parts(node)]
        if len({axis is None for _, axis in own}) > 1:
            raise ValueError(
                f"the optimizer state {own[0][0]!r} is stored in blocks that run along the layer "
                "axis, so that it cannot be cut into layers. Keep that leaf in floating point "
                "(min_size), or give its layers more axes."
            )


def block_leaves(params: Any, blocks: str) -> list[bool]:
    """Per leaf of the parameters, whether it is one of the stacked ones."""
    num_layers(params, blocks)
    leaves = Leaves.of(params)
    numbers = range(len(leaves.values))
    inside = frozenset(jax.tree.leaves(leaves.tree(numbers)[blocks]))
    return [number in inside for number in numbers]


def num_layers(params: Any, blocks: str) -> int:
    """The length of the layer axis.

    Raises:
      ValueError: There are no stacked leaves of equal length.
    """
    if not isinstance(params, dict) or blocks not in params:
        seen = sorted(map(str, params)) if isinstance(params, dict) else type(params).__name__
        raise ValueError(
            f"the parameters must be a dict with the stacked layers under {blocks!r}, got {seen}. "
            "Name the entry that holds them with blocks=."
        )
    leaves = Leaves.of({blocks: params[blocks]})
    if not leaves.values:
        raise ValueError(f"there are no parameters under {blocks!r}.")
    for path, leaf, like in zip(leaves.paths, leaves.values, leaves.shapes, strict=True):
        shape = like.shape
        if not shape:
            raise ValueError(f"leaf {path!r} is a scalar: it lacks the leading layer axis.")
        first = leaves.shapes[0].shape[0]
        if shape[0] != first:
            raise ValueError(
                f"leaf {path!r} of shape {shape} has {shape[0]} layers, but {leaves.paths[0]!r} "
                f"has {first}. All leaves under {blocks!r} are stacked along their first axis."
            )
        if isinstance(leaf, QuantizedArray) and leaf.ndim + leaf.axis == 0:
            raise ValueError(
                f"leaf {path!r} of shape {shape} is stored in blocks that run along the layer "
                "axis. Store it in blocks along another axis, or leave it in floating point."
            )
    return leaves.shapes[0].shape[0]


def check_unchanged(old: Any, new: Any) -> None:
    """Raises unless two optimizer states have the same structure, shapes and dtypes."""
    if not _same_structure(old, new):
        raise ValueError(
            "the update changes the structure of the optimizer state, or `opt_state` is not "
            f"tx.init(params):\n{jax.tree.structure(old)}\n{jax.tree.structure(new)}"
        )
    for name, a, b in zip(paths_of(old), parts(old), parts(new), strict=True):
        if (jnp.shape(a), jnp.result_type(a)) != (jnp.shape(b), jnp.result_type(b)):
            raise ValueError(
                f"the optimizer state {name!r} is {jnp.result_type(a)}{list(jnp.shape(a))} on one "
                f"side and {jnp.result_type(b)}{list(jnp.shape(b))} on the other: `opt_state` is "
                "not tx.init(params), or an update changes it."
            )


def paths_of(tree: Any) -> list[str]:
    """The "/"-joined path of every array, for messages."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


# The arrays of a tree: of a stored weight or a projected gradient several.
parts = jax.tree.leaves


def _check_floating(params: Leaves) -> None:
    for path, like in zip(params.paths, params.shapes, strict=True):
        if not jnp.issubdtype(like.dtype, jnp.floating):
            raise TypeError(
                f"leaf {path!r} has dtype {like.dtype}: only real floating parameters have "
                "gradients. Keep it out of the parameters, in the batch or in the functions of the "
                "model."
            )


def _same_structure(one: Any, other: Any) -> bool:
    treedef: Any = jax.tree.structure(one)
    return treedef == jax.tree.structure(other)


def _at_depth(params: Any, blocks: str, layers: int) -> Any:
    """Shapes of the parameters, in floating point, of a model with so many layers."""
    tree = {
        name: jax.tree.map(abstract, child, is_leaf=lambda x: isinstance(x, QuantizedArray))
        for name, child in params.items()
    }
    tree[blocks] = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((layers, *x.shape[1:]), x.dtype), tree[blocks]
    )
    return tree


def _grown(
    name: str, one: tuple[int, ...], other: tuple[int, ...], layers: int, changed: int
) -> int | None:
    """The axis that is `layers` long in one shape and `changed` in the other."""
    if one == other:
        return None
    differing = [axis for axis, (a, b) in enumerate(zip(one, other, strict=False)) if a != b]
    if len(one) == len(other) and len(differing) == 1:
        (axis,) = differing
        if (one[axis], other[axis]) == (layers, changed):
            return axis
    raise ValueError(
        f"the optimizer state {name!r} has shape {one} for {layers} layers and {other} for "
        f"{changed}: it is no stack of one entry per layer, so that it cannot be cut into layers. "
        "A stack of vectors that is taken for a matrix (axes, targets) does that."
    )
