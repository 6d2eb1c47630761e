"""What is outside the blocks: the head can be updated before the walk, the embedding after it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from galore_jax.layerwise.coupling import Reads
from galore_jax.layerwise.reach import Reach, reach
from galore_jax.layerwise.walk import Layer, Model, together
from galore_jax.views.leaves import flatten_leaves, leaf_paths


class Early(NamedTuple):
    """What is known when the head has been walked back.

    Its gradients, as large as the vocabulary is, need not wait for those of the embedding.

    Args:
      names: Paths of the parameters whose gradients the embedding has no part in.
      arrays: Per array of a `Layer`, whether its update reads such gradients, and no others.
    """

    names: frozenset[str]
    arrays: tuple[bool, ...]

    def before(self, early: Layer, cotangent: Any) -> tuple[Layer, Any]:
        """Both unchanged, but the cotangent is there no sooner than the update.

        The compiler would be free to keep the gradients for an update after the walk.
        """
        treedef: Any
        leaves, treedef = jax.tree.flatten(early)
        known = [x for x, soon in zip(leaves, self.arrays, strict=True) if soon]
        known, cotangent = together((known, cotangent))
        given = iter(known)
        joined = [next(given) if soon else x for x, soon in zip(leaves, self.arrays, strict=True)]
        return treedef.unflatten(joined), cotangent

    def merge(self, early: Layer, late: Layer) -> Layer:
        """The arrays of two updates, each from where all its gradients were there."""
        ours, treedef = jax.tree.flatten(early)
        theirs = jax.tree.leaves(late)
        chosen = [a if soon else b for soon, a, b in zip(self.arrays, ours, theirs, strict=True)]
        return jax.tree.unflatten(treedef, chosen)


def known_early(model: Model, reads: Reads, here: Layer, batch: Any) -> Early:
    """What can be updated before the walk.

    Args:
      model: The model.
      reads: Which gradients enter which update.
      here: Any layer.
      batch: The batch.
    """
    outside = frozenset(leaf_paths(model.outer(here.params)))
    names = outside - _read_by_embed(model, here.params, batch)

    def soon(read: frozenset[str]) -> bool:
        return bool(read) and read <= names

    params = [
        soon(reads.updates.get(path, frozenset()))
        for path, leaf in zip(leaf_paths(here.params), flatten_leaves(here.params)[0], strict=True)
        for _ in jax.tree.leaves(leaf)
    ]
    return Early(names, (*params, *map(soon, reads.state)))


def _read_by_embed(model: Model, params: Any, batch: Any) -> frozenset[str]:
    """Paths of the parameters that the embedding reads."""
    leaves, _ = flatten_leaves(params)
    inputs = [
        Reach(outside=frozenset([path]))
        for path, leaf in zip(leaf_paths(params), leaves, strict=True)
        for _ in jax.tree.leaves(leaf)
    ]
    traced = jax.make_jaxpr(lambda params: model.apply_embed(params, batch))(params)
    return frozenset().union(*(x.outside for x in reach(traced.jaxpr, inputs, 1)))
