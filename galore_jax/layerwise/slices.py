"""Which arrays of a tree have the layer axis, and one layer of them.

A slice keeps the axis, with size one: axes that somebody named, and codes in blocks, mean the same
in it as in the whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.quant import QuantizedArray
from galore_jax.views.leaves import abstract, flatten_leaves, leaf_paths


@dataclasses.dataclass(frozen=True)
class LayerAxes:
    """Where every array of a tree has the layer axis.

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


def params_axes(params: Any, blocks: str) -> LayerAxes:
    """The layer axes of parameters: the first ones of ``params[blocks]``.

    Raises:
      ValueError: There are no stacked leaves of equal length under that name.
    """
    num_layers(params, blocks)
    treedef = jax.tree.structure(params)
    mine = {name: name == blocks for name in params}
    inside = jax.tree.leaves(
        {name: jax.tree.map(lambda _, own=own: own, params[name]) for name, own in mine.items()}
    )
    return LayerAxes(treedef, tuple(0 if own else None for own in inside))


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
    leaves, _ = flatten_leaves(params[blocks])
    named = list(zip(leaf_paths({blocks: params[blocks]}), leaves, strict=True))
    if not named:
        raise ValueError(f"there are no parameters under {blocks!r}.")
    for path, leaf in named:
        shape = abstract(leaf).shape
        if not shape:
            raise ValueError(f"leaf {path!r} is a scalar: it lacks the leading layer axis.")
        first = abstract(named[0][1]).shape[0]
        if shape[0] != first:
            raise ValueError(
                f"leaf {path!r} of shape {shape} has {shape[0]} layers, but {named[0][0]!r} has "
                f"{first}. All leaves under {blocks!r} are stacked along their first axis."
            )
        if isinstance(leaf, QuantizedArray) and leaf.ndim + leaf.axis == 0:
            raise ValueError(
                f"leaf {path!r} of shape {shape} is stored in blocks that run along the layer "
                "axis. Store it in blocks along another axis, or leave it in floating point."
            )
    return abstract(named[0][1]).shape[0]


def check_floating(params: Any) -> None:
    """Raises if there is a parameter without a gradient."""
    leaves, _ = flatten_leaves(params)
    for path, leaf in zip(leaf_paths(params), leaves, strict=True):
        dtype = abstract(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"leaf {path!r} has dtype {dtype}: only real floating parameters have gradients. "
                "Keep it out of the parameters, in the batch or in the functions of the model."
            )


def state_axes(tx: optax.GradientTransformation, params: Any, blocks: str) -> LayerAxes:
    """The layer axes of ``tx.init(params)``, from the shapes at two numbers of layers.

    Raises:
      ValueError: The state does not grow with the number of layers as a stack does.
    """
    layers = num_layers(params, blocks)
    here = jax.eval_shape(tx.init, at_depth(params, blocks, layers))
    there = jax.eval_shape(tx.init, at_depth(params, blocks, layers + 1))
    change = 1
    if layers > 1 and not same_structure(here, there):
        # A threshold on the size of a leaf (8-bit moments have one) may lie in between.
        there = jax.eval_shape(tx.init, at_depth(params, blocks, layers - 1))
        change = -1
    treedef: Any = jax.tree.structure(here)
    if not same_structure(here, there):
        raise ValueError(
            "the structure of the optimizer state changes with the number of layers (something is "
            "stored in blocks that run along the layer axis, perhaps), so that it cannot be cut "
            f"into layers:\n{treedef}\n{jax.tree.structure(there)}"
        )
    paths, _ = jax.tree_util.tree_flatten_with_path(here)
    axes = []
    for (path, one), other in zip(paths, jax.tree.leaves(there), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes.append(_grown(name, one.shape, other.shape, layers, layers + change))
    return LayerAxes(treedef, tuple(axes))


def same_structure(one: Any, other: Any) -> bool:
    """Whether two trees have equal structures."""
    treedef: Any = jax.tree.structure(one)
    return treedef == jax.tree.structure(other)


def at_depth(params: Any, blocks: str, layers: int) -> Any:
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
