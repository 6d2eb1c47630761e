"""Gradients of one piece of a model at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from galore_jax.layerwise.devices import devices_of
from galore_jax.quant.differentiate import probes_of, with_probes

# Cotangent of the output -> gradient of the parameters, cotangents of the inputs.
Pull = Callable[[Any], tuple[Any, ...]]
# (fn, params, opt_state, *inputs, layer=) -> fn(params, *inputs), and its pull; see `pullback`.
Pullback = Callable[..., tuple[Any, Pull]]


def pullback(
    fn: Callable[..., Any],
    params: Any,
    opt_state: Any,
    *inputs: Any,
    layer: jax.Array | int = 0,
) -> tuple[Any, Pull]:
    """The output of `fn`, and the function that takes its cotangent back.

    The seam for other ways of taking a gradient: what a backward pass that projects needs to know
    is in `opt_state` and `layer`. Here that is only whether gradients are local to a device.

    Args:
      fn: ``fn(params, *inputs)``. Multiplies with `galore_jax.matmul` where a parameter is a
        `QuantizedArray`.
      params: Parameters: the whole tree, of the stacked leaves one layer.
      opt_state: State of the optimizer for them.
      *inputs: Floating arrays that `fn` is differentiated by as well.
      layer: The number of that layer.

    Returns:
      The output, and a function from its cotangent to the gradients. That of the parameters has
      their logical shapes and dtypes.
    """
    del layer
    probes = devices_of(opt_state).varying(probes_of(params))

    def of_probes(probes: Any, *inputs: Any) -> Any:
        return fn(with_probes(params, probes), *inputs)

    return jax.vjp(of_probes, probes, *inputs)
