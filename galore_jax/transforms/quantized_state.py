"""Moments of any transformation, stored in 8 bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.quant import dequantize, power
from galore_jax.quant.array import check_format
from galore_jax.transforms.elementwise import is_elementwise
from galore_jax.transforms.explicit_mesh import compiler_chooses
from galore_jax.transforms.streaming import merge, piece_of, streamed
from galore_jax.transport.moments import (
    Moments,
    decoded,
    encode_state_like,
    map_moments,
    only_leaf,
)
from galore_jax.views.leaves import flatten_leaves, rebox


def quantized_state(
    inner: optax.GradientTransformation,
    *,
    block: int = 256,
    min_size: int = 4096,
    bits: int = 8,
) -> optax.GradientTransformationExtraArgs:
    """Stores the moments of `inner` in 8 bits between two updates.

    Moments are decoded, updated by `inner` in fp32, and encoded again: blocks of codes with one
    scale each, whose square root (first moments, signed) or fourth root (second moments, positive)
    lies on a uniform grid. Which fields are moments is known for optax's common states, and can be
    registered with `galore_jax.transport.register_moment`. The update of a step is computed from
    moments that have not been rounded yet. Blocks run along the longer one of the last two axes.

    Works alone, inside `low_rank_projection` with any transport, and inside `optax.partition`.

    Args:
      inner: A transformation that keeps moments.
      block: Entries per block; each has a scale of 4 bytes.
      min_size: Moments with fewer entries stay as they are.
      bits: 8 or 4.

    Returns:
      A transformation with the state of `inner`, in which `quant.PowerArray`s take the place of
      large moments. When `inner` treats every entry by itself, as Adam, Lion and momentum do, large
      leaves are updated in pieces, so that only a piece of the decoded moments is alive.

    Raises:
      TypeError: In `init`, when `inner` keeps no moment that is known.
      ValueError: Bad numbers.

    Example:
      >>> import jax.numpy as jnp, optax, galore_jax as gj
      >>> tx = gj.quantized_state(optax.scale_by_lion())
      >>> state = tx.init({"w": jnp.ones((256, 256))})
      >>> state.mu["w"].codes.dtype, state.mu["w"].scales.shape
      (dtype('uint8'), (256, 1))

    References:
      Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021
      (https://arxiv.org/abs/2110.02861).
    """
    check_format(bits, block)
    inner = optax.with_extra_args_support(inner)

    def encode(leaf: int, moments: Moments) -> Moments:
        del leaf

        def encode_field(x: jax.Array, signed: bool) -> Any:
            small = x.ndim == 0 or x.size < max(min_size, 1)
            if small or not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            axis = power.block_axis(x.shape)
            return power.encode(x, signed=signed, bits=bits, block=block, axis=axis)

        return moments._replace(
            first={name: encode_field(x, True) for name, x in moments.first.items()},
            second={name: encode_field(x, False) for name, x in moments.second.items()},
        )

    def init_fn(params: optax.Params) -> Any:
        leaves, treedef = flatten_leaves(params)
        state = inner.init(treedef.unflatten(map(_wide, leaves)))
        _check_has_moments(state, treedef)
        return map_moments(state, treedef, encode)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        gradients, treedef = flatten_leaves(updates)
        weights = None if params is None else list(map(_wide, flatten_leaves(params)[0]))

        def update(some: Any, stored: Any, some_weights: Any) -> tuple[Any, Any]:
            """`inner` on trees with any of the leaves, or with any slice of them."""
            wide = map_moments(stored, treedef, lambda _, moments: decoded(moments))
            directions, wide = inner.update(
                jax.tree.map(_wide, some), wide, some_weights, **extra_args
            )
            narrow = jax.tree.map(lambda d, g: d.astype(g.dtype), directions, some)
            return narrow, encode_state_like(wide, stored, treedef)

        if not extra_args and _can_stream(inner, gradients, state, weights, treedef):
            pieces = [
                streamed(
                    update,
                    _only(treedef, gradients, leaf),
                    only_leaf(state, treedef, leaf),
                    weights and _only(treedef, weights, leaf),
                )
                for leaf in range(treedef.num_leaves)
            ]
            directions, state = (merge(list(parts)) for parts in zip(*pieces, strict=True))
        else:
            directions, state = update(
                treedef.unflatten(gradients), state, weights and treedef.unflatten(weights)
            )
        return rebox(updates, treedef.flatten_up_to(directions)), state

    return optax.GradientTransformationExtraArgs(init_fn, compiler_chooses(update_fn))


def scale_by_adam8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    block: int = 256,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Adam whose moments take one byte each: `quantized_state(optax.scale_by_adam(...))`.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment, after bias correction.
      block: Entries per block.
      min_size: Moments with fewer entries stay in fp32.

    Returns:
      A gradient transformation.

    Example:
      >>> import optax, galore_jax as gj
      >>> tx = optax.chain(gj.scale_by_adam8bit(), optax.scale_by_learning_rate(1e-3))

    References:
      Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021
      (https://arxiv.org/abs/2110.02861).
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    return quantized_state(adam, block=block, min_size=min_size)


def _wide(leaf: Any) -> jax.Array:
    """A leaf in fp32 at least: a bf16 second moment could not decay."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        leaf = jnp.zeros(leaf.shape, leaf.dtype)
    array = jnp.asarray(dequantize(leaf))
    narrow = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
    return array.astype(jnp.float32) if narrow else array


def _only(treedef: Any, leaves: list[Any], leaf: int) -> Any:
    masked = [optax.MaskedNode()] * len(leaves)
    return treedef.unflatten([*masked[:leaf], leaves[leaf], *masked[leaf + 1 :]])


def _can_stream(
    inner: optax.GradientTransformationExtraArgs,
    gradients: list[Any],
    state: Any,
    weights: list[Any] | None,
    treedef: Any,
) -> bool:
    """Whether some leaf is worth cutting, and `inner` treats every entry of it by itself."""
    if all(piece_of(jnp.shape(gradient)) is None for gradient in gradients):
        return False
    leaves = range(treedef.num_leaves)
    wide = jax.eval_shape(
        lambda stored: map_moments(stored, treedef, lambda _, moments: decoded(moments)), state
    )
    numbered = map_moments(
        wide,
        treedef,
        lambda leaf, moments: moments._replace(
            first=dict.fromkeys(moments.first, leaf), second=dict.fromkeys(moments.second, leaf)
        ),
    )
    owners = [x if isinstance(x, int) else None for x in jax.tree.leaves(numbered)]
    if any(o is None and x.ndim for o, x in zip(owners, jax.tree.leaves(wide), strict=True)):
        return False  # it keeps arrays of unknown meaning
    trees = [treedef.unflatten(map(_wide, gradients)), wide]
    numbers = [*leaves, *owners]
    if weights is not None:
        trees.append(treedef.unflatten(weights))
    return is_elementwise(
        inner.update, trees, [*numbers, *(leaves if weights else ())], expected=numbers
    )


def _check_has_moments(state: Any, treedef: Any) -> None:
    found = 0

    def count(leaf: int, moments: Moments) -> Moments:
        nonlocal found
        del leaf
        found += len(moments.first) + len(moments.second)
        return moments

    map_moments(state, treedef, count)
    if treedef.num_leaves and not found:
        raise TypeError(
            "quantized_state found no moments in the state of its inner transformation. Tell "
            "galore_jax.transport.register_moment which fields of its state are moments."
        )
