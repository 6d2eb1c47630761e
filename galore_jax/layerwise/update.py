"""The update of one block, or of what is outside the blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.layerwise.coupling import Reads, check_unchanged
from galore_jax.layerwise.walk import Layer
from galore_jax.transforms import apply_updates
from galore_jax.views.leaves import abstract, flatten_leaves, leaf_paths, rebox

# From the paths of gradients to whether all of them are finite; from none to whether the step is.
Finite = Callable[[frozenset[str]], jax.Array]


def updated(
    tx: optax.GradientTransformationExtraArgs,
    reads: Reads,
    key: jax.Array | None,
    here: Layer,
    gradients: Any,
    *,
    finite: Finite,
    layer: jax.Array | int = 0,
    norm: jax.Array | float = 0.0,
) -> Layer:
    """Parameters and state after an update, as far as it is finite.

    Where it is not, the update is zero, and state that is made from the gradient stays what it was;
    counts and plans go on.

    Args:
      tx: The transformation.
      reads: Which gradients enter which of its results.
      key: For stochastic rounding, or None.
      here: Parameters and state, of the stacked arrays one layer.
      gradients: Like the parameters.
      finite: See `Finite`.
      layer: The number of that layer.
      norm: Global norm of all gradients of the step, once it is known: blocks have no use for it.
    """
    layer, norm = jnp.asarray(layer, jnp.int32), jnp.asarray(norm, jnp.float32)
    updates, opt_state = tx.update(
        gradients, here.opt_state, here.params, layer=layer, grad_norm=norm
    )
    check_unchanged(here.opt_state, opt_state)
    _check_shapes(updates, here.params)
    # Chosen among parameters: zeros in the place of an update would take the memory of one.
    params = [
        jax.tree.map(
            functools.partial(jnp.where, finite(reads.updates.get(path, frozenset()))), new, before
        )
        for path, new, before in zip(
            leaf_paths(here.params),
            flatten_leaves(apply_updates(here.params, updates, key=key, layer=layer))[0],
            flatten_leaves(here.params)[0],
            strict=True,
        )
    ]
    old, treedef = jax.tree.flatten(here.opt_state)
    kept = [
        jnp.where(finite(names), new, before)
        for names, new, before in zip(reads.state, jax.tree.leaves(opt_state), old, strict=True)
    ]
    return Layer(
        rebox(here.params, params),
        jax.tree.unflatten(treedef, kept),
    )


def _check_shapes(updates: Any, params: Any) -> None:
    """Raises if an update has grown: by an array for all layers, in the transformation itself."""
    shapes = dict(zip(leaf_paths(params), map(abstract, flatten_leaves(params)[0]), strict=True))
    for path, update in zip(leaf_paths(updates), flatten_leaves(updates)[0], strict=True):
        if jnp.shape(update) != shapes[path].shape:
            raise ValueError(
                f"the update of {path!r} has shape {jnp.shape(update)} where its parameter has "
                f"{shapes[path].shape}: the transformation holds an array for all layers, but gets "
                "one layer at a time. Keep the array in its state, or pick its entry by the extra "
                "argument `layer` of update."
            )
