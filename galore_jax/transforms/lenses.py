"""Finding lenses inside the state of any chain, partition or wrapper."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.checks import quietly
from galore_jax.leaves import Leaves, is_leaf
from galore_jax.transforms.config import LowRankConfig
from galore_jax.transforms.lens import (
    Layer,
    Lens,
    check_alike,
    check_same_storage,
    entered,
    full_shapes,
    kinds_of,
)
from galore_jax.transforms.state import AccumulateState, LowRankState, low_rank_states
from galore_jax.transforms.state_tree import lens_on, likes_of
from galore_jax.transforms.subspace import LeafSubspace


class ProjectionLeaves(NamedTuple):
    """The leaves of one lens and what is known about their subspaces.

    Args:
      config: Of the lens.
      subspaces: One per leaf that the lens sees.
      owners: Number of each of them among all leaves of the parameters.
    """

    config: LowRankConfig
    subspaces: list[LeafSubspace]
    owners: list[int]


def projection_leaves(opt_state: Any, params: Any, layer: Layer = 0) -> list[ProjectionLeaves]:
    """The subspaces that the next gradient is taken in, for every lens of an optimizer state.

    Inside a window of `accumulate` these are the window's, and nothing is due any more.

    Args:
      opt_state: State of any transformation.
      params: Its parameters, or their `ShapeDtypeStruct`s.
      layer: See `low_rank_projection`.
    """
    return [
        ProjectionLeaves(state.config, lens.subspaces(state, layer), owners)
        for state, lens, owners in current_lenses(opt_state, Leaves.of(params))
    ]


def current_lenses(opt_state: Any, leaves: Leaves) -> list[tuple[LowRankState, Lens, list[int]]]:
    """The lenses of a state on its parameters, with the bases that the next gradient is taken in.

    Args:
      opt_state: State of any transformation.
      leaves: Its parameters, or their shapes.

    Returns:
      For each lens its state, its plans, and the numbers of its leaves among all.
    """
    likes = likes_of(leaves)
    found: list[tuple[LowRankState, Lens, list[int]]] = []
    for node in jax.tree.leaves(opt_state, is_leaf=_is_known):
        if isinstance(node, LowRankState):
            lens, seen = lens_on(node, likes)
            found.append((node, lens, [like.owner for like in seen]))
        elif isinstance(node, AccumulateState):
            stored = leaves.split(node.projectors)
            for state, lens, owners in current_lenses(node.opt_state, leaves):
                own = [stored[owner] for owner in owners]
                found.append((_in_window(lens, state, own, node.mini_step == 0), lens, owners))
    return found


def _in_window(
    lens: Lens, state: LowRankState, stored: list[Any], first: jax.Array
) -> LowRankState:
    """A lens with the bases of a window that has begun, which refreshes at its start only."""
    chosen = [
        jax.tree.map(lambda now, then: jnp.where(first, now, then.astype(now.dtype)), *pair)
        for pair in zip(lens.treedef.flatten_up_to(state.projectors), stored, strict=True)
    ]
    flags = state.refresh_state
    due = {name: flag.astype(bool) & first for name, flag in flags.due.items()}
    return state._replace(
        projectors=lens.treedef.unflatten(chosen), refresh_state=flags._replace(due=due)
    )


def with_configs(opt_state: Any, tx: optax.GradientTransformation, params: Any) -> Any:
    """A state with the options of `tx`: some may differ from those that it was made with.

    Raises:
      ValueError: `tx` has other lenses, or those cannot go on from this state.
    """
    leaves = Leaves.of(params)
    now = low_rank_states(abstract_state(tx, leaves))
    then = low_rank_states(opt_state)
    if len(now) != len(then):
        raise ValueError(
            f"the optimizer has {len(now)} low-rank projections, but the state has {len(then)}: it "
            "is the state of another optimizer."
        )
    for ours, theirs in zip(now, then, strict=True):
        check_same_storage(ours.config, theirs.config)
    configs, likes = iter([lens.config for lens in now]), likes_of(leaves)

    def renew(node: Any) -> Any:
        if not isinstance(node, LowRankState):
            return node
        return entered(lens_on(node._replace(config=next(configs)), likes)[0], node)

    return jax.tree.map(renew, opt_state, is_leaf=lambda node: isinstance(node, LowRankState))


def settled(opt_state: Any, like: Any) -> Any:
    """A state with the structure and the dtypes of another one, of equal shapes."""
    pairs = zip(*map(jax.tree.leaves, (opt_state, like)), strict=True)
    return jax.tree.unflatten(jax.tree.structure(like), [x.astype(y.dtype) for x, y in pairs])


def with_lost_configs(
    opt_state: Any, tx: optax.GradientTransformation, updates: Any, params: Any
) -> Any:
    """A state whose lenses have their configs, also where a checkpointer has dropped them.

    Args:
      opt_state: State of `tx`.
      tx: The transformation.
      updates: Gradients.
      params: Parameters, if they are there.
    """
    if all(isinstance(lens.config, LowRankConfig) for lens in low_rank_states(opt_state)):
        return opt_state
    leaves = Leaves.of(updates)
    if params is None:
        return with_configs(opt_state, tx, leaves.tree(full_shapes(leaves, None)))
    check_alike(leaves, Leaves.of(params))
    return with_configs(opt_state, tx, params)


def abstract_state(tx: optax.GradientTransformation, leaves: Leaves) -> Any:
    """Shapes of ``tx.init(params)``, without the warnings of a real one."""
    with quietly():
        return jax.eval_shape(tx.init, leaves.boxed(leaves.shapes))


def _is_known(node: Any) -> bool:
    return isinstance(node, LowRankState | AccumulateState)


def kinds_in(state: LowRankState) -> dict[str, list[str]]:
    """Paths of the projected leaves of a lens by kind, read off its state alone.

    Raises:
      ValueError: The state has lost its config.
    """
    if not isinstance(state.config, LowRankConfig):
        raise ValueError(
            "this state has lost the config of its lens, perhaps in a checkpointer that drops "
            "what holds no array: `tx.update` puts it back."
        )
    basis = jax.ShapeDtypeStruct((2, 1), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    one = jax.eval_shape(state.config.codec.encode, *basis)  # of one matrix: no batch axes
    form: Any = jax.tree.structure(one)
    trailing = jax.tree.leaves(one)[0].ndim
    leaves = Leaves.of(
        state.projectors, is_leaf=lambda x: is_leaf(x) or jax.tree.structure(x) == form
    )
    firsts = [jnp.shape(jax.tree.leaves(stored)[0]) for stored in leaves.values]
    projected = [
        (path, path, shape[: len(shape) - trailing])
        for path, shape in zip(leaves.paths, firsts, strict=True)
        if shape
    ]
    kinds = kinds_of(projected)
    assert set(kinds) == set(state.refresh_state.due), "a codec whose parts lack the batch axes"
    return kinds
