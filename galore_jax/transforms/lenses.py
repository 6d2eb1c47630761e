"""Finding lenses inside the state of any chain, partition or wrapper."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.transforms import stages
from galore_jax.transforms.config import LowRankConfig, check_same_storage
from galore_jax.transforms.state import AccumulateState, LowRankState
from galore_jax.transforms.subspace import LeafSubspace
from galore_jax.views import leaf_plan
from galore_jax.views.leaves import abstract, flatten_leaves, leaf_paths


class LensLeaves(NamedTuple):
    """The leaves of one lens and what is known about their subspaces.

    Args:
      config: Of the lens.
      subspaces: One per leaf that the lens sees.
    """

    config: LowRankConfig
    subspaces: list[LeafSubspace]


def lens_leaves(opt_state: Any, params: Any, layer: stages.Layer = 0) -> list[LensLeaves]:
    """The subspaces that the next gradient is taken in, for every lens of an optimizer state.

    Inside a window of `accumulate` these are the window's, and nothing is due any more.

    Args:
      opt_state: State of any transformation.
      params: Its parameters, or their `ShapeDtypeStruct`s.
      layer: See `low_rank_projection`.
    """
    found = []
    for node in jax.tree.leaves(opt_state, is_leaf=_is_known):
        if isinstance(node, LowRankState):
            own, treedef = flatten_leaves(own_params(node, params))
            plans = leaf_plan(node.config, treedef.unflatten(own))
            found.append(LensLeaves(node.config, stages.subspaces(node, treedef, plans, layer)))
        elif isinstance(node, AccumulateState):
            inner = lens_leaves(node.opt_state, params, layer)
            found.extend(_of_window(node, lens) for lens in inner)
    return found


def with_configs(opt_state: Any, tx: optax.GradientTransformation, params: Any) -> Any:
    """A state with the options of `tx`: some may differ from those that it was made with.

    Raises:
      ValueError: `tx` has other lenses, or those cannot go on from this state.
    """
    leaves, treedef = flatten_leaves(params)
    now = find_lenses(jax.eval_shape(tx.init, treedef.unflatten(map(abstract, leaves))))
    then = find_lenses(opt_state)
    if len(now) != len(then):
        raise ValueError(
            f"the optimizer has {len(now)} low-rank projections, but the state has {len(then)}: it "
            "is the state of another optimizer."
        )
    for ours, theirs in zip(now, then, strict=True):
        check_same_storage(ours.config, theirs.config)
    configs = iter([lens.config for lens in now])
    return jax.tree.map(
        lambda node: node._replace(config=next(configs)) if _is_lens(node) else node,
        opt_state,
        is_leaf=_is_lens,
    )


def _of_window(window: AccumulateState, lens: LensLeaves) -> LensLeaves:
    """Bases of a window that has begun."""
    first = window.mini_step == 0
    paths = leaf_paths(window.sums)
    treedef = flatten_leaves(window.sums)[1]
    stored = dict(zip(paths, treedef.flatten_up_to(window.projectors), strict=True))
    return lens._replace(
        subspaces=[
            leaf._replace(
                stored=jax.tree.map(
                    lambda now, then: jnp.where(first, now, then),
                    leaf.stored,
                    stored[leaf.plan.path],
                ),
                due=leaf.due & first,
            )
            for leaf in lens.subspaces
        ]
    )


def find_lenses(opt_state: Any) -> list[LowRankState]:
    """All states of `low_rank_projection` in an optimizer state, in order."""
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_lens)
    return [node for node in nodes if _is_lens(node)]


def own_params(lens: LowRankState, params: Any) -> Any:
    """The parameters that the lens got, in the structure in which it got them.

    What a mask keeps from it is a `MaskedNode` there, for a leaf or for a whole branch.
    """
    given = dict(zip(leaf_paths(params), flatten_leaves(params)[0], strict=True))
    # One array per leaf, whatever a basis is stored as.
    likes = lens.refresh_state.refreshes
    _, treedef = flatten_leaves(likes)
    return treedef.unflatten(given[path] for path in leaf_paths(likes))


def _is_known(node: Any) -> bool:
    return isinstance(node, LowRankState | AccumulateState)


def _is_lens(node: Any) -> bool:
    return isinstance(node, LowRankState)
