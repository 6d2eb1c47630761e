"""Gradients of weights that are stored as codes.

Codes are integers and have no tangent. A weight that is differentiated is therefore handed to the
model together with a probe: an array of the weight's shape, never read, whose cotangent is defined
to be the gradient of the decoded weight. Nothing of the weight's size is kept for the backward
pass: it is decoded again there, one layer at a time under `scan`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.quant.array import QuantizedArray, dequantize
from galore_jax.quant.weight import Label, WrappedWeight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class DifferentiableWeight(WrappedWeight):
    """A `QuantizedArray` that can be differentiated, as the loss function gets it.

    Multiply with `galore_jax.matmul`; `astype` decodes it, differentiably.

    Args:
      weight: The stored weight.
      probe: Zeros in its shape and dtype; receives the gradient.
      path: Of the leaf, for messages.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> seen = []
      >>> loss = lambda params: seen.append(params) or jnp.sum(params.astype(jnp.float32))
      >>> value, grads = gj.quant.value_and_grad(loss)(gj.quant.quantize(jnp.ones((2, 8))))
      >>> type(seen[0]).__name__, grads.shape
      ('DifferentiableWeight', (2, 8))
    """

    weight: QuantizedArray
    probe: jax.Array
    path: Label = dataclasses.field(metadata={"static": True}, default=Label(""))

    def decoded(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The decoded weight; its cotangent is the gradient of the weight."""
        return _decoded(self.weight, self.probe).astype(dtype)

    def matmul(self, x: jax.Array) -> jax.Array:
        return _product(x, self.weight, self.probe)


def value_and_grad(loss_fn: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
    """`jax.value_and_grad` for parameters of which some are `QuantizedArray`s.

    The model multiplies with `galore_jax.matmul(x, w)`, or decodes with ``w.astype(dtype)``.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs) -> scalar``, or ``(scalar, aux)``.
      has_aux: Whether it returns a pair.

    Returns:
      A function of the same arguments that returns the value and the gradient with respect to
      `params`: an array of the logical shape and dtype for a `QuantizedArray`.

    Example:
      >>> import jax, jax.numpy as jnp, galore_jax as gj
      >>> params = {"w": gj.quant.quantize(jnp.ones((4, 2))), "b": jnp.zeros(2)}
      >>> loss = lambda p, x: jnp.sum(gj.matmul(x, p["w"]) + p["b"])
      >>> value, grads = gj.quant.value_and_grad(loss)(params, jnp.ones((3, 4)))
      >>> grads["w"].shape, float(grads["w"][0, 0])
      ((4, 2), 3.0)
    """

    def value_and_grad_fn(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        def loss_of_probes(probes: Any) -> Any:
            return loss_fn(with_probes(params, probes), *args, **kwargs)

        return jax.value_and_grad(loss_of_probes, has_aux=has_aux)(probes_of(params))

    return value_and_grad_fn


def probes_of(params: Any) -> Any:
    """Parameters, and zeros in the places of those stored as codes."""
    return jax.tree.map(_probe, params, is_leaf=_is_quantized)


def with_probes(params: Any, probes: Any) -> Any:
    """Parameters as the loss function gets them."""
    return jax.tree_util.tree_map_with_path(_attach, params, probes, is_leaf=_is_quantized)


@jax.custom_vjp
def _product(x: jax.Array, weight: QuantizedArray, probe: jax.Array) -> jax.Array:
    del probe
    return jnp.matmul(x, dequantize(weight).astype(x.dtype))


def _product_bwd(residuals: tuple[jax.Array, QuantizedArray], dy: jax.Array):
    x, weight = residuals
    _, pull = jax.vjp(jnp.matmul, x, dequantize(weight).astype(x.dtype))
    dx, dw = pull(dy)
    return dx, None, dw.astype(weight.dtype)


_product.defvjp(lambda *args: (_product(*args), args[:2]), _product_bwd)


@jax.custom_vjp
def _decoded(weight: QuantizedArray, probe: jax.Array) -> jax.Array:
    del probe
    return dequantize(weight)


_decoded.defvjp(
    lambda weight, probe: (_decoded(weight, probe), None), lambda _, cotangent: (None, cotangent)
)


def _is_quantized(node: Any) -> bool:
    return isinstance(node, QuantizedArray)


def _probe(leaf: Any) -> Any:
    return jnp.zeros(leaf.shape, leaf.dtype) if _is_quantized(leaf) else leaf


def _attach(path: Any, leaf: Any, probe: Any) -> Any:
    if not _is_quantized(leaf):
        return probe
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return DifferentiableWeight(leaf, probe, Label(name))
