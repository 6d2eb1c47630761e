"""Shardings of an optimizer state, from those of the parameters."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from galore_jax.quant import QuantizedArray, dequantize_params
from galore_jax.transforms import LowRankState
from galore_jax.transforms.lenses import own_params
from galore_jax.views import leaf_plan
from galore_jax.views.leaves import abstract, flatten_leaves, is_one_leaf, leaf_paths
from galore_jax.views.specs import (
    axis_names,
    basis_spec,
    entry_of,
    low_rank_spec,
    that_divides,
)


def state_sharding(
    tx: optax.GradientTransformation,
    params: Any,
    params_sharding: Any,
    *,
    spread: bool = False,
) -> Any:
    """How the state of any optimizer is sharded when its parameters are.

    A moment of a leaf that is not projected is sharded like its parameter. Of a projected leaf,
    with P the mesh axes of its projected matrix axis and K those of the other one, a basis
    ``[*batch, projected, rank]`` is sharded ``(*batch, P, None)`` and a low-rank moment
    ``[*batch, kept, rank]`` ``(*batch, K, None)``. Flags, counts and scalars are replicated, and so
    is an axis that the mesh does not divide.

    Finds lenses and parameter-shaped trees wherever they are: in chains, masks, partitions,
    `inject_hyperparams`, `MultiSteps`, `apply_if_finite`, with 8-bit moments and INT4 bases.

    To keep the shardings, give them to the jitted step: ``jax.jit(step, out_shardings=(...))``.

    Args:
      tx: Any optax transformation.
      params: Parameters or their `ShapeDtypeStruct`s; `quant.QuantizedArray`s count as the arrays
        they stand for, as in ``tx.init(quant.dequantize_params(params))``.
      params_sharding: Tree like `params` with a `NamedSharding` for each leaf.
      spread: Also use P for the kept axis of low-rank moments, which are otherwise replicated over
        it. Worth it when weights are sharded along their projected axis.

    Returns:
      A tree like ``tx.init(params)`` with a `NamedSharding` for each array.

    Raises:
      ValueError: The trees do not match, or a mesh axis does not divide a parameter.
      TypeError: A sharding is not a `NamedSharding`.

    Example:
      >>> import jax, jax.numpy as jnp, galore_jax as gj
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> params = {"w": jnp.ones((64, 128))}
      >>> shardings = {"w": NamedSharding(mesh, P(None, "fsdp"))}
      >>> tx = gj.galore_adamw(1e-2, rank=8)
      >>> state = gj.state_sharding(tx, params, shardings)
      >>> tuple(state[0].inner_state.mu["w"].spec), tuple(state[0].projectors["w"].spec)
      (('fsdp', None), (None, None))
    """
    leaves, treedef = flatten_leaves(params)
    paths = leaf_paths(params)
    shardings = _matching(params_sharding, treedef, paths)
    shapes = [abstract(leaf) for leaf in leaves]
    for path, leaf, sharding in zip(paths, shapes, shardings, strict=True):
        _check_divides(path, leaf.shape, sharding)
    state = jax.eval_shape(tx.init, treedef.unflatten(shapes))
    if not shardings:
        raise ValueError("there is no parameter to take a mesh from.")
    tree = _Tree(treedef, [_Like(x.shape, s.spec) for x, s in zip(shapes, shardings, strict=True)])
    return _Walk(shardings[0].mesh, treedef.unflatten(shapes), spread).node(state, tree)


def init_sharded(
    tx: optax.GradientTransformation,
    params: Any,
    params_sharding: Any,
    *,
    spread: bool = False,
) -> Any:
    """``tx.init(params)``, created in shards: no device ever holds the whole state.

    Args:
      tx: Any optax transformation.
      params: Parameters; `quant.QuantizedArray`s are decoded for `tx`.
      params_sharding: Tree like `params` with a `NamedSharding` for each leaf.
      spread: See `state_sharding`.

    Returns:
      The state of `tx`.

    Raises:
      ValueError: The trees do not match, or a mesh axis does not divide a parameter.

    Example:
      >>> import jax, jax.numpy as jnp, galore_jax as gj
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> params = {"w": jnp.ones((64, 128))}
      >>> state = gj.init_sharded(
      ...     gj.galore_adamw(1e-2, rank=8), params, {"w": NamedSharding(mesh, P("fsdp"))}
      ... )
      >>> tuple(state[0].projectors["w"].sharding.spec)
      ('fsdp', None)
    """
    shardings = state_sharding(tx, params, params_sharding, spread=spread)
    return jax.jit(lambda p: tx.init(dequantize_params(p)), out_shardings=shardings)(params)


@dataclasses.dataclass(frozen=True)
class _Like:
    """What an array of a state may be sharded like."""

    shape: tuple[int, ...]
    spec: PartitionSpec


@dataclasses.dataclass(frozen=True)
class _Tree:
    """A structure to look for in a state, and what its leaves are like."""

    treedef: Any
    leaves: list[_Like]


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Through a state, from the top."""

    mesh: Any
    params: Any
    spread: bool

    def node(self, node: Any, tree: _Tree) -> Any:
        """Shardings of any part of a state."""
        if isinstance(node, LowRankState):
            return self.lens(node, tree)
        leaves = _leaves_like(node, tree)
        if leaves is not None:
            return tree.treedef.unflatten(map(self.leaf, leaves, tree.leaves))
        children, treedef = jax.tree.flatten(node, is_leaf=lambda x: x is not node)
        if len(children) == 1 and children[0] is node:
            return self.sharding((), PartitionSpec())  # an array like no parameter
        return jax.tree.unflatten(treedef, [self.node(child, tree) for child in children])

    def lens(self, lens: LowRankState, tree: _Tree) -> LowRankState:
        """A lens: bases and low-rank moments have specs of their own."""
        own, treedef = flatten_leaves(own_params(lens, self.params))
        plans = leaf_plan(lens.config, treedef.unflatten(own))
        specs = _specs_by_path(self.params, tree)
        bases, low_rank = [], []
        for plan in plans:
            spec = specs[plan.path]
            if plan.view is None:
                bases.append(_Like((), PartitionSpec()))
                low_rank.append(_Like(plan.shape, spec))
                continue
            bases.append(_Like(plan.view.basis_shape(plan.rank), basis_spec(plan.view, spec)))
            low_rank.append(
                _Like(
                    plan.view.low_rank_shape(plan.rank),
                    low_rank_spec(plan.view, spec, spread=self.spread),
                )
            )
        replicated: Any = self.sharding((), PartitionSpec())
        return lens._replace(
            count=replicated,
            projectors=self.node(lens.projectors, _Tree(treedef, bases)),
            refresh_state=jax.tree.map(lambda _: replicated, lens.refresh_state),
            inner_state=self.node(lens.inner_state, _Tree(treedef, low_rank)),
        )

    def leaf(self, node: Any, like: _Like) -> Any:
        """What a state has in the place of one leaf: an array like it, or parts of one."""
        if is_one_leaf(node):
            # All parts have its axes, with some of them shorter.
            return jax.tree.map(lambda part: self.sharding(part.shape, like.spec), node)
        return jax.tree.map(lambda x: self.sharding(x.shape, _restricted(like, x.shape)), node)

    def sharding(self, shape: tuple[int, ...], spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, that_divides(spec, shape, dict(self.mesh.shape)))


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


def _specs_by_path(params: Any, tree: _Tree) -> dict[str, PartitionSpec]:
    return {path: like.spec for path, like in zip(leaf_paths(params), tree.leaves, strict=True)}


def _matching(params_sharding: Any, treedef: Any, paths: list[str]) -> list[NamedSharding]:
    """The sharding of every parameter."""
    try:
        nodes = treedef.flatten_up_to(params_sharding)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`params_sharding` does not match the parameters: it needs a NamedSharding in the "
            f"place of every leaf. {error}"
        ) from None
    found = []
    for path, node in zip(paths, nodes, strict=True):
        inside = jax.tree.leaves(node, is_leaf=is_one_leaf)  # boxes have theirs in a box
        # The codes of a quantized weight have its axes.
        inside = [x.codes if isinstance(x, QuantizedArray) else x for x in inside]
        if len(inside) != 1 or not isinstance(inside[0], NamedSharding):
            raise TypeError(f"leaf {path!r}: expected a NamedSharding, got {node!r}.")
        found.append(inside[0])
    return found


def _check_divides(path: str, shape: tuple[int, ...], sharding: NamedSharding) -> None:
    sizes = dict(sharding.mesh.shape)
    for axis, size in enumerate(shape):
        names = axis_names(entry_of(sharding.spec, axis))
        shards = math.prod(sizes[name] for name in names)
        if size % shards:
            raise ValueError(
                f"leaf {path!r} of shape {shape}: axis {axis} has {size} entries, which the mesh "
                f"axes {names} ({shards} shards) do not divide. Shard another axis, or none."
            )
