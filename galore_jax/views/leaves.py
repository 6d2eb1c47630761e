"""What counts as one leaf of a parameter or gradient tree, and its path."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax


class OneLeaf:
    """A pytree node that stands for one array: to a tree of parameters or gradients, a leaf."""


def is_box(node: Any) -> bool:
    """Whether `node` is a Flax metadata box (linen `Partitioned`, an NNX `Variable`)."""
    # Looked up, not imported: without Flax in the process there can be no boxes.
    meta, nnx = sys.modules.get("flax.core.meta"), sys.modules.get("flax.nnx")
    return (meta is not None and isinstance(node, meta.AxisMetadata)) or (
        nnx is not None and isinstance(node, nnx.Variable)
    )


def is_one_leaf(node: Any) -> bool:
    """Whether `node` is a pytree node that stands for one array."""
    return isinstance(node, OneLeaf)


def is_leaf(node: Any) -> bool:
    """Nodes that JAX would descend into and that are one leaf to us."""
    return is_one_leaf(node) or is_box(node)


def flatten_leaves(tree: Any) -> tuple[list[Any], Any]:
    """Leaves with their boxes taken off, and the structure without boxes."""
    leaves, treedef = jax.tree.flatten(without_masked(tree), is_leaf=is_leaf)
    return [_unbox(leaf) for leaf in leaves], treedef


def unboxed(tree: Any) -> Any:
    """The tree without boxes."""
    return jax.tree.map(_unbox, tree, is_leaf=is_leaf)


def without_masked(tree: Any) -> Any:
    """Nodes whose parts a mask took away, as one `optax.MaskedNode`, like any other leaf.

    A mask made by mapping over the parameters has a boolean for each part of such a node.
    """
    return jax.tree.map(
        lambda node: optax.MaskedNode() if _is_masked(node) else node, tree, is_leaf=is_leaf
    )


def _is_masked(node: Any) -> bool:
    return is_one_leaf(node) and not jax.tree.leaves(node)


def rebox(tree: Any, leaves: list[Any]) -> Any:
    """Puts `leaves` into the structure of `tree`, inside the boxes that `tree` has."""
    old, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)
    boxed = [
        jax.tree.unflatten(jax.tree.structure(box, is_leaf=is_one_leaf), [leaf])
        if is_box(box)
        else leaf
        for box, leaf in zip(old, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, boxed)


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf: of the array it stands for, if it is a node."""
    if is_one_leaf(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def leaf_paths(tree: Any) -> list[str]:
    """The "/"-joined path of every leaf, in flattening order."""
    with_path, _ = jax.tree_util.tree_flatten_with_path(without_masked(tree), is_leaf=is_leaf)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in with_path]


def _unbox(leaf: Any) -> Any:
    if not is_box(leaf):
        return leaf
    (value,) = jax.tree.leaves(leaf, is_leaf=is_one_leaf)
    return value
