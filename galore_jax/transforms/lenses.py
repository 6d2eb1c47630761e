"""Finding lenses inside the state of any chain, partition or wrapper."""

from __future__ import annotations

from typing import Any

import jax
import optax

from galore_jax.transforms.state import LowRankState
from galore_jax.views.leaves import flatten_leaves, leaf_paths


def find_lenses(opt_state: Any) -> list[LowRankState]:
    """All states of `low_rank_projection` in an optimizer state, in order."""
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_lens)
    return [node for node in nodes if _is_lens(node)]


def own_params(lens: LowRankState, params: Any) -> Any:
    """The parameters as the lens got them: those that a mask keeps from it are `MaskedNode`s."""
    seen = set(leaf_paths(lens.projectors))
    leaves, treedef = flatten_leaves(params)
    return treedef.unflatten(
        leaf if path in seen else optax.MaskedNode()
        for path, leaf in zip(leaf_paths(params), leaves, strict=True)
    )


def _is_lens(node: Any) -> bool:
    return isinstance(node, LowRankState)
