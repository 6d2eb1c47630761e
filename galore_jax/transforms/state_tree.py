"""One walk over any optimizer state: whose every array is, what for, and along which axes.

Found by structure: what has the structure of the parameters is theirs, leaf by leaf, and lenses say
what they keep. Names mean nothing. Shardings, bytes and tables are folds over the result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from galore_jax.leaves import Leaves, is_box, is_one_leaf
from galore_jax.transforms.lens import Lens
from galore_jax.transforms.state import AccumulateState, LowRankState, low_rank_states
from galore_jax.views import LeafPlan
from galore_jax.views.shardings import sharding_that_divides
from galore_jax.views.specs import flattened, joined

# Roles; fields of `memory.Memory`.
PROJECTORS, MOMENTS, FULL_RANK, REFRESH, OTHER = (
    "projectors", "moments", "full_rank", "refresh", "other",
)  # fmt: skip

# Axes of a parameter that an axis of an array is made of, flattened together; () for none.
Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Like:
    """An array that is expected in the place of a parameter.

    Args:
      owner: Number of the parameter; None for what belongs to no single one.
      shape: Shape of the array.
      dtype: Its dtype.
      axes: For each of its axes those of the parameter that it is made of.
      role: What it is for, one of the roles above.
      kept: Its kept axis, if it is of low rank.
      spare: Axes of the parameter that it lacks, whose mesh axes the kept one may take as well.
    """

    owner: Any
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[Axes, ...]
    role: str = FULL_RANK
    kept: int = 0
    spare: Axes = ()

    def made_of(self, axes: Iterable[int]) -> Axes:
        """Axes of the parameter that some axes of this array are made of."""
        return tuple(a for axis in axes for a in self.axes[axis])


@dataclasses.dataclass(frozen=True)
class StateArray(Like):
    """One array of a state.

    Args:
      name: What a person calls it: ``mu``, ``projectors.codes``.
      shared_by: Numbers of the parameters that have equal shares in it, if there are several.
    """

    name: str = ""
    shared_by: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    @property
    def shares(self) -> dict[int | None, int]:
        """Bytes by the number of the parameter."""
        owners = self.shared_by or (self.owner,)
        return dict.fromkeys(owners, self.nbytes // len(owners))


def likes_of(leaves: Leaves) -> Any:
    """The parameters themselves, as a tree of `Like`s."""
    return leaves.tree(
        [
            Like(i, x.shape, x.dtype, tuple((axis,) for axis in range(len(x.shape))))
            for i, x in enumerate(leaves.shapes)
        ]
    )


def matched(likes: Any, tree: Any) -> tuple[list[Like], list[Any], Any]:
    """The parts of a tree in the places of parameters.

    What a mask keeps from it is a `MaskedNode` there, for a leaf or for a whole branch; a complex
    leaf may be a pair of real ones.

    Args:
      likes: Tree of `Like`s.
      tree: A tree like it, with anything in the place of a leaf.

    Returns:
      The `Like`s that are not masked, what is in their places, and the structure of both.

    Raises:
      ValueError: It is another tree.
    """

    def seen(known: Any, node: Any) -> Any:
        if isinstance(node, optax.MaskedNode):
            return node
        if isinstance(known, Like):
            is_pair = getattr(node, "_fields", None) == ("real", "imaginary")
            if is_pair and jnp.issubdtype(known.dtype, jnp.complexfloating):
                real = dataclasses.replace(known, dtype=jnp.finfo(known.dtype).dtype)
                return type(node)(real, real)
            return known
        treedef: Any
        children, treedef = jax.tree.flatten(known, is_leaf=lambda child: child is not known)
        return treedef.unflatten(map(seen, children, treedef.flatten_up_to(node)))

    treedef: Any
    owners, treedef = jax.tree.flatten(seen(likes, tree))
    return owners, treedef.flatten_up_to(tree), treedef


def lens_on(state: LowRankState, likes: Any) -> tuple[Lens, list[Like]]:
    """A lens on those of the parameters that it sees, and these."""
    owners, _, treedef = matched(likes, state.projectors)
    shapes = [jax.ShapeDtypeStruct(like.shape, like.dtype) for like in owners]
    return Lens.of(state.config, treedef, shapes), owners


def state_arrays(state: Any, leaves: Leaves) -> Any:
    """A tree like a state, or its shapes, with a `StateArray` in the place of each array.

    Args:
      state: State of any transformation, or its shapes.
      leaves: Its parameters, or their shapes.
    """
    return _any(state, likes_of(leaves), "")


def spec_of(array: StateArray, shardings: list[NamedSharding], *, spread: bool) -> PartitionSpec:
    """Spec of one array of a state, also where no mesh divides it.

    Args:
      array: Which one.
      shardings: Those of all parameters.
      spread: See `galore_jax.state_sharding`.
    """
    if array.owner is None:
        return PartitionSpec()
    spec = shardings[array.owner].spec
    entries = [flattened(axes, spec) for axes in array.axes]
    if spread and array.spare:
        entries[array.kept] = joined(entries[array.kept], flattened(array.spare, spec))
    return PartitionSpec(*entries)


def sharding_of(
    array: StateArray, shardings: list[NamedSharding], *, spread: bool
) -> NamedSharding:
    """Sharding of one array of a state over those mesh axes that divide its own; see `spec_of`."""
    wanted = NamedSharding(shardings[0].mesh, spec_of(array, shardings, spread=spread))
    return sharding_that_divides(wanted, array.shape)


def _any(node: Any, likes: Any, name: str) -> Any:
    if isinstance(node, LowRankState):
        return _lens(node, likes)
    if isinstance(node, AccumulateState):
        return _window(node, likes)
    found = _like_parameters(node, likes, name)
    if found is not None:
        return found
    children, treedef = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda child: child is not node
    )
    if len(children) == 1 and children[0][1] is node:
        return _of_nobody(node, name, OTHER)
    return jax.tree.unflatten(
        treedef, [_any(child, likes, _name_of(key, name)) for (key,), child in children]
    )


def _lens(state: LowRankState, likes: Any) -> LowRankState:
    lens, owners = lens_on(state, likes)
    low_rank, bases = zip(*map(_factors, lens.plans, owners), strict=True) if owners else ((), ())
    flags, stored = state.refresh_state, lens.treedef.flatten_up_to(state.projectors)
    memories = zip(low_rank, owners, lens.memory_of(state.recovery_state), strict=True)
    return state._replace(
        count=_of_nobody(state.count, "count", OTHER),
        projectors=lens.treedef.unflatten(map(_stored, bases, stored)),
        refresh_state=type(flags)(*(_by_kind(field, lens, low_rank) for field in flags)),
        inner_state=_any(state.inner_state, lens.treedef.unflatten(low_rank), ""),
        recovery_state=lens.memories([_recovered(*memory) for memory in memories]),
    )


def _window(window: AccumulateState, likes: Any) -> AccumulateState:
    """A window that accumulates gradients; the optimizer inside is walked as without one."""
    owners, _, treedef = matched(likes, window.sums)
    sums = {like.owner: like for like in owners}
    bases = {like.owner: _replace(like, shape=(), axes=()) for like in owners}
    for state in low_rank_states(window.opt_state):
        lens, own = lens_on(state, likes)
        for plan, like in zip(lens.plans, own, strict=True):
            sums[like.owner], bases[like.owner] = _factors(plan, like)

    def each(tree: Any, like_of: dict[int, Like], name: str) -> Any:
        parts = zip((like.owner for like in owners), treedef.flatten_up_to(tree), strict=True)
        return treedef.unflatten(
            [_stored(_replace(like_of[i], role=OTHER), part, name) for i, part in parts]
        )

    return window._replace(
        mini_step=_of_nobody(window.mini_step, "mini_step", OTHER),
        sums=each(window.sums, sums, "sums"),
        projectors=each(window.projectors, bases, "projectors"),
        moved=jax.tree.map(lambda x: _of_nobody(x, "moved", OTHER), window.moved),
        opt_state=_any(window.opt_state, likes, ""),
    )


_replace = dataclasses.replace


def _factors(plan: LeafPlan, like: Like) -> tuple[Like, Like]:
    """R and the stored basis of a leaf; itself and a scalar where it is not projected."""
    view, rank = plan.view, plan.rank
    if view is None:
        return like, Like(like.owner, (), like.dtype, (), PROJECTORS)
    batch = tuple(like.made_of((axis,)) for axis in view.batch)
    kept, projected = like.made_of(view.kept), like.made_of(view.projected)
    low_rank = _replace(
        like, shape=view.low_rank_shape(rank), axes=(*batch, kept, ()), role=MOMENTS,
        kept=len(batch), spare=projected,
    )  # fmt: skip
    axes = (*batch, projected, ())
    basis = Like(like.owner, view.basis_shape(rank), like.dtype, axes, PROJECTORS, len(batch))
    return low_rank, basis


def _like_parameters(node: Any, likes: Any, name: str) -> Any | None:
    """`node` walked leaf by leaf, if it has the structure of the parameters; else None."""
    try:
        owners, parts, treedef = matched(likes, node)
    except (ValueError, TypeError):
        return None
    if not owners or not all(map(_stands_for_an_array, parts)):
        return None
    pairs = list(zip(owners, (getattr(part, "shape", ()) for part in parts), strict=True))
    is_nameless = type(node) in (tuple, list) or parts[0] is node
    if is_nameless and not any(_restricted(*pair) for pair in pairs):
        return None  # a few counts, say: they look like parameters by chance
    found = zip(owners, parts, strict=True)
    return treedef.unflatten(_arrays(like, part, name, ()) for like, part in found)


def _stands_for_an_array(node: Any) -> bool:
    return is_one_leaf(node) or is_box(node) or node is None or jax.tree_util.all_leaves([node])


def _arrays(like: Like, node: Any, name: str, otherwise: tuple[Axes, ...]) -> Any:
    """The arrays in the place of one leaf: with some of the axes of `like`, or with others."""

    def of(part: Any) -> Any:
        axes = _restricted(like, part.shape) or otherwise  # those of all parts of a stored array
        parts, treedef = jax.tree_util.tree_flatten_with_path(part)
        fields = (jax.tree_util.keystr(key, simple=True, separator=".") for key, _ in parts)
        names = [".".join(filter(None, (name, field))) for field in fields]
        pairs = zip(names, parts, strict=True)
        return jax.tree.unflatten(treedef, [_array(like, x, axes, n) for n, (_, x) in pairs])

    return jax.tree.map(of, node, is_leaf=is_one_leaf)


def _stored(like: Like, node: Any, name: str = PROJECTORS) -> Any:
    """The arrays that a codec, a recovery or a policy keeps of one leaf, batch axes leading."""
    return _arrays(like, node, name, like.axes[: like.kept])


def _recovered(low_rank: Like, full: Like, node: Any) -> Any:
    """Memory of a recovery, of low rank or at full size."""
    return jax.tree.map(
        lambda x: _stored(full if x.shape == full.shape else low_rank, x, "recovery"), node
    )


def _by_kind(field: Any, lens: Lens, low_rank: Sequence[Like]) -> Any:
    """Flags and memory: numbers per matrix, or tuples of one array like R per leaf."""
    if not isinstance(field, dict):
        return _of_nobody(field, REFRESH, REFRESH)

    def of_kind(node: Any, members: list[int]) -> Any:
        likes = [_replace(low_rank[i], role=REFRESH) for i in members]
        owners = tuple(like.owner for like in likes)

        def of(part: Any) -> Any:
            if type(part) is tuple and [x.shape for x in part] == [x.shape for x in likes]:
                return tuple(_stored(*pair, "memory") for pair in zip(likes, part, strict=True))
            return jax.tree.map(
                lambda x: _replace(_of_nobody(x, REFRESH, REFRESH), shared_by=owners), part
            )

        return jax.tree.map(of, node, is_leaf=lambda x: type(x) is tuple)

    return {name: of_kind(field[name], members) for name, members in lens.kinds.items()}


def _array(like: Like, x: Any, axes: tuple[Axes, ...], name: str) -> StateArray:
    axes = (*axes, *[()] * (len(x.shape) - len(axes)))
    spare = like.spare if axes[: len(like.axes)] == like.axes else ()
    return StateArray(like.owner, x.shape, x.dtype, axes, like.role, like.kept, spare, name)


def _of_nobody(x: Any, name: str, role: str) -> Any:
    shape = jnp.shape(x)
    return StateArray(None, shape, jnp.result_type(x), ((),) * len(shape), role, name=name)


def _restricted(like: Like, shape: tuple[int, ...]) -> tuple[Axes, ...]:
    """Axes of an array that has some of those of `like`, as a factored moment; () if others."""
    axes: list[Axes] = []
    axis = 0
    for size in shape:
        while axis < len(like.shape) and like.shape[axis] != size:
            axis += 1
        if axis == len(like.shape):
            return ()
        axes.append(like.axes[axis])
        axis += 1
    return tuple(axes)


def _name_of(key: Any, outer: str) -> str:
    """Name of a child of a node: of a field or a dict entry; that of the node for a position."""
    name = getattr(key, "name", getattr(key, "key", outer))
    return name if isinstance(name, str) else outer
