"""What the axes of a state are to be sharded over, whatever optimizer it belongs to."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from galore_jax.transforms.lenses import find_lenses, own_params
from galore_jax.transforms.state import AccumulateState, LowRankState
from galore_jax.views import leaf_plan
from galore_jax.views.leaves import abstract, flatten_leaves, is_one_leaf, leaf_paths
from galore_jax.views.specs import basis_spec, entry_of, low_rank_spec


def state_specs(state: Any, params: Any, specs: list[PartitionSpec], *, spread: bool) -> Any:
    """Specs of all arrays of a state, also where no mesh divides them.

    Args:
      state: State of any transformation, or its shapes.
      params: Its parameters, or their `ShapeDtypeStruct`s.
      specs: One per leaf of `params`.
      spread: See `low_rank_spec`.

    Returns:
      A tree like `state` with a `PartitionSpec` for each array.
    """
    leaves, treedef = flatten_leaves(params)
    likes = [_Like(abstract(x).shape, spec) for x, spec in zip(leaves, specs, strict=True)]
    return _Walk(treedef.unflatten(leaves), spread).node(state, _Tree(treedef, likes))


@dataclasses.dataclass(frozen=True)
class _Like:
    """What an array of a state may be sharded like."""

    shape: tuple[int, ...]
    spec: PartitionSpec


_SCALAR = _Like((), PartitionSpec())


class _LensLikes(NamedTuple):
    """What a lens keeps of one leaf."""

    basis: _Like
    low_rank: _Like


@dataclasses.dataclass(frozen=True)
class _Tree:
    """A structure to look for in a state, and what its leaves are like."""

    treedef: Any
    leaves: list[_Like]


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Through a state, from the top."""

    params: Any
    spread: bool

    def node(self, node: Any, tree: _Tree) -> Any:
        """Specs of any part of a state."""
        if isinstance(node, LowRankState):
            return self.lens(node, tree)
        if isinstance(node, AccumulateState):
            return self.window(node, tree)
        leaves = _leaves_like(node, tree)
        if leaves is not None:
            return tree.treedef.unflatten(map(_leaf, leaves, tree.leaves))
        children, treedef = jax.tree.flatten(node, is_leaf=lambda x: x is not node)
        if len(children) == 1 and children[0] is node:
            return PartitionSpec()  # an array like no parameter
        return jax.tree.unflatten(treedef, [self.node(child, tree) for child in children])

    def lens(self, lens: LowRankState, tree: _Tree) -> LowRankState:
        """A lens: bases and low-rank moments have specs of their own."""
        _, treedef = flatten_leaves(own_params(lens, self.params))
        likes = list(self.likes(lens, tree).values())
        replicated: Any = PartitionSpec()
        return lens._replace(
            count=replicated,
            projectors=self.node(lens.projectors, _Tree(treedef, [like.basis for like in likes])),
            refresh_state=jax.tree.map(lambda _: replicated, lens.refresh_state),
            inner_state=self.node(
                lens.inner_state, _Tree(treedef, [like.low_rank for like in likes])
            ),
        )

    def window(self, window: AccumulateState, tree: _Tree) -> AccumulateState:
        """Sums are like low-rank moments, or like parameters that no lens projects."""
        paths = leaf_paths(self.params)
        known = {
            path: _LensLikes(_SCALAR, like) for path, like in zip(paths, tree.leaves, strict=True)
        }
        for lens in find_lenses(window.opt_state):
            known |= self.likes(lens, tree)
        likes = [known[path] for path in paths]
        replicated: Any = PartitionSpec()
        return window._replace(
            mini_step=replicated,
            sums=self.node(window.sums, _Tree(tree.treedef, [like.low_rank for like in likes])),
            projectors=self.node(
                window.projectors, _Tree(tree.treedef, [like.basis for like in likes])
            ),
            moved=jax.tree.map(lambda _: replicated, window.moved),
            opt_state=self.node(window.opt_state, tree),
        )

    def likes(self, lens: LowRankState, tree: _Tree) -> dict[str, _LensLikes]:
        """What a lens keeps of every leaf that it sees, by path."""
        own, treedef = flatten_leaves(own_params(lens, self.params))
        given = dict(zip(leaf_paths(self.params), tree.leaves, strict=True))
        found = {}
        for plan in leaf_plan(lens.config, treedef.unflatten(own)):
            spec, view = given[plan.path].spec, plan.view
            found[plan.path] = (
                _LensLikes(_SCALAR, _Like(plan.shape, spec))
                if view is None
                else _LensLikes(
                    _Like(view.basis_shape(plan.rank), basis_spec(view, spec)),
                    _Like(
                        view.low_rank_shape(plan.rank),
                        low_rank_spec(view, spec, spread=self.spread),
                    ),
                )
            )
        return found


def _leaf(node: Any, like: _Like) -> Any:
    """What a state has in the place of one leaf: an array like it, or arrays with its axes."""

    def parts(array: Any) -> Any:
        spec = _restricted(like, array.shape)
        return jax.tree.map(lambda _: spec, array)

    return jax.tree.map(parts, node, is_leaf=is_one_leaf)


def _leaves_like(node: Any, tree: _Tree) -> list[Any] | None:
    """The parts of `node` in the places of the leaves of `tree`; None if it is another tree."""
    try:
        leaves = tree.treedef.flatten_up_to(node)
    except (ValueError, TypeError):
        return None
    if not all(map(_is_one_array, leaves)):
        return None  # a container that has as many children, by chance
    if leaves and leaves[0] is node:
        # The parameters are one array, which anything looks like.
        return leaves if getattr(node, "shape", None) == tree.leaves[0].shape else None
    return leaves


def _is_one_array(node: Any) -> bool:
    """An array, what stands for one, or nothing: also inside a box."""
    return is_one_leaf(node) or len(jax.tree.leaves(node, is_leaf=is_one_leaf)) <= 1


def _restricted(like: _Like, shape: tuple[int, ...]) -> PartitionSpec:
    """Spec of an array with some of the axes of `like` (a factored moment); else replicated."""
    entries, axis = [], 0
    for size in shape:
        while axis < len(like.shape) and like.shape[axis] != size:
            axis += 1
        if axis == len(like.shape):
            return PartitionSpec()
        entries.append(entry_of(like.spec, axis))
        axis += 1
    return PartitionSpec(*entries)
