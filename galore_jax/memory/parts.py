"""The arrays of a state: what each of them is for, and whose it is.

Found by structure, not by name: what has the structure of the parameters is theirs, leaf by leaf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.transforms import AccumulateState, LowRankState
from galore_jax.transforms.lenses import own_params
from galore_jax.views import leaf_plan
from galore_jax.views.leaves import abstract, flatten_leaves, is_one_leaf, leaf_paths

# Roles; fields of a `Memory`.
PROJECTORS, MOMENTS, FULL_RANK, REFRESH, OTHER = (
    "projectors", "moments", "full_rank", "refresh", "other",
)  # fmt: skip


class Part(NamedTuple):
    """Some bytes of a state.

    Args:
      owner: Path of the parameter they belong to; None for what belongs to no single one.
      role: What they are for, one of the roles above.
      nbytes: How many.
    """

    owner: str | None
    role: str
    nbytes: int


def parts(state: Any, params: Any) -> list[Part]:
    """All arrays of a state.

    Args:
      state: State of any transformation, or its shapes.
      params: Its parameters, or their `ShapeDtypeStruct`s.

    Returns:
      The parts; they sum up to the state.
    """
    return list(_any(state, _Tree.of(params), lambda path: FULL_RANK))


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays; scalars that stand where a leaf has nothing count as well."""
    arrays = map(abstract, jax.tree.leaves(tree))
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)


# Role of an array of the parameter with this path.
_RoleOf = Callable[[str], str]


class _Tree(NamedTuple):
    """A tree of parameters to look for in a state."""

    params: Any
    treedef: Any
    paths: list[str]

    @classmethod
    def of(cls, params: Any) -> _Tree:
        leaves, treedef = flatten_leaves(params)
        return cls(treedef.unflatten(leaves), treedef, leaf_paths(params))


def _any(node: Any, tree: _Tree, role_of: _RoleOf) -> Iterator[Part]:
    if isinstance(node, LowRankState):
        yield from _lens(node, tree)
        return
    if isinstance(node, AccumulateState):
        yield from _window(node, tree, role_of)
        return
    leaves = _leaves_like(node, tree)
    if leaves is not None:
        for path, leaf in zip(tree.paths, leaves, strict=True):
            yield Part(path, role_of(path), tree_bytes(leaf))
        return
    children = jax.tree.leaves(node, is_leaf=lambda x: x is not node)
    if len(children) == 1 and children[0] is node:
        yield Part(None, OTHER, tree_bytes(node))
        return
    for child in children:
        yield from _any(child, tree, role_of)


def _lens(lens: LowRankState, tree: _Tree) -> Iterator[Part]:
    own = _Tree.of(own_params(lens, tree.params))
    plans = leaf_plan(lens.config, own.params)
    projected = {plan.path for plan in plans if plan.view is not None}
    yield Part(None, OTHER, tree_bytes(lens.count))
    for path, stored in zip(own.paths, own.treedef.flatten_up_to(lens.projectors), strict=True):
        yield Part(path, PROJECTORS, tree_bytes(stored))
    yield from _all_as(REFRESH, lens.refresh_state, own)
    yield from _any(lens.inner_state, own, lambda path: MOMENTS if path in projected else FULL_RANK)


def _window(window: AccumulateState, tree: _Tree, role_of: _RoleOf) -> Iterator[Part]:
    """Of a window that accumulates gradients, the optimizer inside counts as it does without."""
    own = window._replace(opt_state=())
    yield from _all_as(OTHER, tuple(own), tree)
    yield from _any(window.opt_state, tree, role_of)


def _all_as(role: str, node: Any, tree: _Tree) -> Iterator[Part]:
    """Everything in `node`, for one purpose."""
    for part in _any(node, tree, lambda path: role):
        yield part._replace(role=role)


def _leaves_like(node: Any, tree: _Tree) -> list[Any] | None:
    """The parts of `node` in the places of the parameters; None if it is another tree."""
    try:
        leaves = tree.treedef.flatten_up_to(node)
    except (ValueError, TypeError):
        return None
    if not leaves or not all(map(_is_one_array, leaves)):
        return None
    if leaves[0] is node and not any(map(jnp.ndim, jax.tree.leaves(node))):
        return None  # the parameters are one array, which any count looks like
    return leaves


def _is_one_array(node: Any) -> bool:
    """An array, what stands for one, or nothing: also inside a box."""
    return is_one_leaf(node) or len(jax.tree.leaves(node, is_leaf=is_one_leaf)) <= 1
