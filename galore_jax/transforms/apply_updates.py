"""Adding updates to parameters that are stored in few bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax.keys import leaf_key, rounding_noise
from galore_jax.leaves import Leaves, unboxed
from galore_jax.quant.array import QuantizedArray, add


def apply_updates(
    params: optax.Params,
    updates: optax.Updates,
    *,
    key: jax.Array | None,
    layer: jax.Array | int = 0,
) -> optax.Params:
    r"""`optax.apply_updates` that also writes INT8 and bf16 leaves, with stochastic rounding.

    An update smaller than half a step of the stored format would be lost by rounding to nearest,
    every time. Rounding up with the probability of the fraction keeps it in expectation:

    .. math::
      W \leftarrow \mathrm{SR}(W + \Delta), \qquad \mathbb{E}\,\mathrm{SR}(x) = x.

    A block of codes keeps its scale as long as its values fit, so that the noise is in proportion
    to the update; a block whose updates are all zero, or a bf16 entry, keeps every bit.

    Args:
      params: Parameters; leaves may be `quant.QuantizedArray`s.
      updates: What the optimizer returned, in the logical shapes; None leaves a leaf as it is.
      key: A `jax.random` key, another one at every step; None rounds to nearest. The same key
        gives the same bits.
      layer: For slices ``[1, ...]`` of one layer out of a stack, the number of the layer: they are
        rounded as inside the stack.

    Returns:
      The new parameters, stored as the old ones. Leaves that are neither quantized nor bf16 are
      what `optax.apply_updates` makes of them.

    Example:
      >>> import jax, jax.numpy as jnp, galore_jax as gj
      >>> params = {"w": jnp.ones(1000, jnp.bfloat16)}        # a bf16 step at one is 2**-7
      >>> updates = {"w": jnp.full(1000, 2.0**-9, jnp.bfloat16)}
      >>> new = gj.apply_updates(params, updates, key=jax.random.key(0))
      >>> sorted({float(x) for x in new["w"]}), 200 < int((new["w"] > 1).sum()) < 300
      ([1.0, 1.0078125], True)

    References:
      Zhang et al., "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank
      Gradients", 2024, section 3.4 (https://arxiv.org/abs/2407.08296).
    """
    leaves = Leaves.of(params)
    rows = zip(leaves.paths, leaves.values, leaves.split(unboxed(updates)), strict=True)
    return leaves.boxed([_apply(*row, key, layer) for row in rows])


def _apply(
    path: str, param: Any, update: Any, key: jax.Array | None, layer: jax.Array | int
) -> Any:
    if update is None or isinstance(update, optax.MaskedNode):
        return param
    if isinstance(param, QuantizedArray):
        if update.shape != param.shape:
            raise ValueError(
                f"leaf {path!r}: the parameter has shape {param.shape}, its update {update.shape}."
            )
        noise = None if key is None else rounding_noise(leaf_key(key, path), param.shape, layer)
        return add(param, update, noise)
    if key is not None and jnp.result_type(param) == jnp.bfloat16:
        noise = rounding_noise(leaf_key(key, path), jnp.shape(param), layer)
        total = jnp.asarray(param).astype(jnp.float32) + update.astype(jnp.float32)
        return stochastic_bfloat16(total, noise)
    return optax.apply_updates(param, update)


def stochastic_bfloat16(x: jax.Array, noise: jax.Array) -> jax.Array:
    """fp32 -> bf16, up with the probability of the part that is cut off.

    Args:
      x: fp32.
      noise: In [0, 1), of its shape.
    """
    # The 16 bits that bf16 lacks, plus 16 random bits, carry into the others just so often.
    word = jax.lax.bitcast_convert_type(x, jnp.uint32)
    carried = word + (noise * np.float32(2.0**16)).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(carried & np.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
