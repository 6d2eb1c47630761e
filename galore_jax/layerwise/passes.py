"""Passes through the blocks: forwards, and back again one block at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax import collectives
from galore_jax.layerwise.slices import Layer
from galore_jax.quant.differentiate import probes_of, with_probes

# Cotangent of the output -> gradient of the parameters, cotangents of the inputs.
Pull = Callable[[Any], tuple[Any, ...]]
# (fn, params, opt_state, *inputs, layer=) -> fn(params, *inputs), and its pull.
Pullback = Callable[..., tuple[Any, Pull]]


class Model(NamedTuple):
    """A model in three pieces.

    Args:
      embed: ``(params, batch) -> x``.
      block: ``(layer_params, x) -> x``.
      head: ``(params, x, batch) -> loss``, or ``(loss, aux)``.
      blocks: Name of the stacked layers among the parameters.
      has_aux: Whether the head returns a pair.
      pullback: Takes the gradient of a piece; see `galore_jax.backward.pullback`.
    """

    embed: Callable[..., Any]
    block: Callable[..., Any]
    head: Callable[..., Any]
    blocks: str
    has_aux: bool
    pullback: Pullback

    # The pieces as functions of parameters with one layer of the blocks.

    def apply_embed(self, params: Any, batch: Any) -> Any:
        return self.embed(self.outer(params), batch)

    def apply_block(self, params: Any, x: Any) -> Any:
        return self.block(jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), params[self.blocks]), x)

    def apply_head(self, params: Any, x: Any, batch: Any) -> tuple[Any, Any]:
        result = self.head(self.outer(params), x, batch)
        return result if self.has_aux else (result, None)

    def outer(self, params: Any) -> Any:
        """The parameters outside the blocks."""
        return {name: child for name, child in params.items() if name != self.blocks}


class Forward(NamedTuple):
    """Results of the forward pass, and of the head backwards.

    Args:
      loss: Scalar.
      aux: Second result of the head; None without one.
      inputs: Inputs of the blocks, stacked.
      cotangent: Of the output of the last block.
      outer: Gradient of the parameters by way of the head; zero in the blocks.
      pull_embed: Cotangent of the input of the first block -> gradient by way of the embedding.
    """

    loss: jax.Array
    aux: Any
    inputs: Any
    cotangent: Any
    outer: Any
    pull_embed: Pull


def forward(model: Model, stack: Any, here: Layer, batch: Any) -> Forward:
    """Runs the model, keeping the input of every block, and the head backwards.

    Args:
      model: The model.
      stack: The parameters of all blocks.
      here: Any layer, with what is outside the blocks.
      batch: Passed on.
    """

    def block(x: Any, layer_params: Any) -> tuple[Any, Any]:
        return model.block(with_probes(layer_params, probes_of(layer_params)), x), x

    x, pull_embed = model.pullback(functools.partial(model.apply_embed, batch=batch), *here)
    x, inputs = jax.lax.scan(block, x, stack)
    (loss, aux), pull_head = model.pullback(
        functools.partial(model.apply_head, batch=batch), *here, x
    )
    if jnp.shape(loss) != ():
        raise ValueError(f"`head` must return a scalar loss, got shape {jnp.shape(loss)}.")
    outer, cotangent = pull_head((jnp.ones_like(loss), jax.tree.map(_no_cotangent, aux)))
    return Forward(loss, aux, inputs, cotangent, outer, pull_embed)


def backward(
    model: Model,
    passed: Forward,
    carry: Any,
    layer_of: Callable[[Any, jax.Array], Layer],
    visit: Callable[[Any, jax.Array, Layer, Any], Any],
) -> tuple[Any, Any]:
    """Visits the blocks from the last to the first, each with its gradient.

    Args:
      model: The model.
      passed: The forward pass.
      carry: Handed from visit to visit.
      layer_of: ``(carry, number) -> Layer``, read before the visit.
      visit: ``(carry, number, Layer, gradients) -> carry``.

    Returns:
      The last carry, and the gradient of the parameters outside the blocks.
    """

    def body(carried: tuple[Any, Any], xs: tuple[jax.Array, Any]) -> tuple[Any, None]:
        (cotangent, carry), (number, x) = carried, xs
        here = layer_of(carry, number)
        _, pull = model.pullback(model.apply_block, *here, x, layer=number)
        gradients, cotangent = pull(cotangent)
        # The layer is cut out again for its update, so that nothing is kept for it meanwhile. And
        # XLA's CPU backend otherwise folds the transposition of a bf16 gradient into a projection,
        # and then cannot run that product.
        own, number = barrier((gradients[model.blocks], number))
        gradients = {**gradients, model.blocks: own}
        return (cotangent, visit(carry, number, layer_of(carry, number), gradients)), None

    length = jax.tree.leaves(passed.inputs)[0].shape[0]
    (cotangent, carry), _ = jax.lax.scan(
        body,
        (passed.cotangent, carry),
        (jnp.arange(length, dtype=jnp.int32), passed.inputs),
        reverse=True,
    )
    # In a branch: the zeros that rows are added to would otherwise be there during the whole pass.
    (by_embed,) = jax.lax.cond(
        jax.lax.optimization_barrier(True),
        passed.pull_embed,
        lambda x: jax.tree.map(jnp.zeros_like, jax.eval_shape(passed.pull_embed, x)),
        cotangent,
    )
    return carry, jax.tree.map(jnp.add, passed.outer, by_embed)


def barrier(tree: Any) -> Any:
    """Optimization barrier that keeps which mapped axes every array varies over."""
    return jax.tree.map(
        lambda now, before: before if collectives.varying_axes(now, before) else now,
        jax.lax.optimization_barrier(tree),
        tree,
    )


def _no_cotangent(x: jax.Array) -> Any:
    if jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(jnp.shape(x), jax.dtypes.float0)
