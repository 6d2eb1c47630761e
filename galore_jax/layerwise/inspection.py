"""What a step has to know about parameters and state before it is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.layerwise.coupling import Reads, check_unchanged, check_uncoupled
from galore_jax.layerwise.slices import (
    LayerAxes,
    at_depth,
    check_floating,
    num_layers,
    params_axes,
    state_axes,
)
from galore_jax.layerwise.walk import Layer
from galore_jax.transforms.lenses import with_configs


def inspector(
    tx: optax.GradientTransformationExtraArgs, *, blocks: str, layers_alone: bool
) -> Callable[[Layer], tuple[Layer, LayerAxes, Reads]]:
    """A function from parameters and state to what a step needs.

    That is the two of them, with the options of `tx` in the state; their layer axes; and what the
    update reads. It raises what `train_step` raises, and looks at each combination of shapes once.
    """
    seen: dict[Any, tuple[LayerAxes, Reads]] = {}

    def inspect(given: Layer) -> tuple[Layer, LayerAxes, Reads]:
        params_axes(given.params, blocks)
        check_floating(given.params)
        whole = given._replace(opt_state=with_configs(given.opt_state, tx, given.params))
        leaves, treedef = jax.tree.flatten(whole)
        signature = treedef, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        if signature not in seen:
            seen[signature] = _inspect(tx, whole, blocks, layers_alone)
        return whole, *seen[signature]

    return inspect


def _inspect(
    tx: optax.GradientTransformationExtraArgs, whole: Layer, blocks: str, layers_alone: bool
) -> tuple[LayerAxes, Reads]:
    params = params_axes(whole.params, blocks)
    state = state_axes(tx, whole.params, blocks)
    depth = num_layers(whole.params, blocks)
    check_unchanged(jax.eval_shape(tx.init, at_depth(whole.params, blocks, depth)), whole.opt_state)
    reads = check_uncoupled(tx, whole.params, state, blocks=blocks, layers_alone=layers_alone)
    return LayerAxes(jax.tree.structure(whole), params.axes + state.axes), reads
