"""One leaf of a parameter or gradient tree: what counts as one, its path, and the way back."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax


class OneLeaf:
    """A pytree node that stands for one array: to a tree of parameters or gradients, a leaf."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array, where the node knows it."""
        raise AttributeError("shape")

    @property
    def ndim(self) -> int:
        """Number of its axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of its entries."""
        return math.prod(self.shape)


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
    if isinstance(node, dict | list | tuple | jax.Array | None):
        return False  # most of what there is
    return isinstance(node, OneLeaf) or is_box(node)


@dataclasses.dataclass(frozen=True)
class Leaves:
    """A tree taken apart once: leaves without their boxes, and the way back.

    Identity of a leaf is its place in the list. Paths are for messages and rules.

    Args:
      values: The leaves, boxes taken off.
      treedef: Structure of the tree without boxes.
      given: The tree.
      is_leaf: Nodes that are one leaf although JAX would descend into them.
    """

    values: list[Any]
    treedef: Any
    given: Any
    is_leaf: Callable[[Any], bool] = is_leaf

    @classmethod
    def of(cls, tree: Any, is_leaf: Callable[[Any], bool] = is_leaf) -> Leaves:
        """The leaves of `tree`.

        A node whose parts a mask took away counts as an `optax.MaskedNode`: a mask made by mapping
        over the parameters has a boolean for each part of such a node.
        """
        treedef: Any
        nodes, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)
        if not any(map(is_leaf, nodes)):
            return cls(nodes, treedef, tree, is_leaf)  # nothing but arrays
        if any(map(_is_masked, nodes)):
            nodes = [optax.MaskedNode() if _is_masked(node) else node for node in nodes]
            nodes, treedef = jax.tree.flatten(treedef.unflatten(nodes), is_leaf=is_leaf)
        values = [_unbox(node) if is_box(node) else node for node in nodes]
        return cls(values, treedef, tree, is_leaf)

    @functools.cached_property
    def paths(self) -> list[str]:
        """The "/"-joined path of every leaf; written out in full where two would read alike."""
        nodes, _ = jax.tree_util.tree_flatten_with_path(self.given, is_leaf=self.is_leaf)
        keys = [key for key, node in nodes if not _is_masked(node)]
        paths = [jax.tree_util.keystr(key, simple=True, separator="/") for key in keys]
        seen = collections.Counter(paths)
        return [
            path if seen[path] == 1 else jax.tree_util.keystr(key)
            for path, key in zip(paths, keys, strict=True)
        ]

    @functools.cached_property
    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of every leaf."""
        return list(map(abstract, self.values))

    def tree(self, values: Sequence[Any]) -> Any:
        """The tree without boxes, with other leaves."""
        return self.treedef.unflatten(values)

    def split(self, tree: Any) -> list[Any]:
        """Subtrees of `tree` in the places of the leaves."""
        return self.treedef.flatten_up_to(tree)

    def boxed(self, values: Sequence[Any]) -> Any:
        """The tree as it was given, boxes included, with other leaves."""
        treedef: Any
        nodes, treedef = jax.tree.flatten(self.given, is_leaf=self.is_leaf)
        if treedef == self.treedef and not any(map(is_box, nodes)):
            return treedef.unflatten(values)
        rest = iter(values)
        return jax.tree.unflatten(
            treedef,
            [node if _is_masked(node) else _put(next(rest), node) for node in nodes],
        )


def unboxed(tree: Any) -> Any:
    """The tree without boxes."""
    return jax.tree.map(lambda x: _unbox(x) if is_box(x) else x, tree, is_leaf=is_leaf)


def has_masks(tree: Any) -> bool:
    """Whether something was masked away: the tree is a part of another one."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    return any(isinstance(node, optax.MaskedNode) for node in nodes)


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a leaf: of the array it stands for, if it is a node."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _is_masked(node: Any) -> bool:
    return isinstance(node, OneLeaf) and not jax.tree.leaves(node)


def _put(value: Any, box: Any) -> Any:
    if not is_box(box):
        return value
    return jax.tree.unflatten(jax.tree.structure(box, is_leaf=is_one_leaf), [value])


def _unbox(box: Any) -> Any:
    (value,) = jax.tree.leaves(box, is_leaf=is_one_leaf)
    return value
