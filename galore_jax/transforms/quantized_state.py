"""Moments of any transformation, stored in 8 bits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.meshes import sharded_alike
from galore_jax.quant import dequantize, power
from galore_jax.quant.array import check_format
from galore_jax.transforms.elementwise import Entrywise, entrywise
from galore_jax.transforms.projected import updates_like
from galore_jax.transforms.streaming import merge, piece_of, streamed
from galore_jax.transport.moments import (
    Moments,
    decoded,
    encode_state_like,
    map_moments,
    only_leaf,
)
from galore_jax.views.leaves import flatten_leaves, leaf_paths, rebox


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
      bits: 8; or 4, with which Adam's update is off by half and more: try before you rely on it.

    Returns:
      A transformation with the state of `inner`, in which `quant.PowerArray`s take the place of
      large moments. When `inner` treats every entry by itself, as Adam, Lion and momentum do, large
      stacks of layers are updated in pieces, so that only a piece of the decoded moments is alive.

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
        _check_storage(state, treedef, leaf_paths(updates), bits, block)
        weights = None if params is None else list(map(_wide, flatten_leaves(params)[0]))
        program = _entrywise(inner, gradients, state, weights, extra_args, treedef)
        if program is None:
            directions, state = _whole(inner, gradients, state, weights, extra_args, treedef)
        else:
            pieces = [
                streamed(
                    functools.partial(_piece, program, leaf, treedef),
                    _only(treedef, gradients, leaf),
                    only_leaf(state, treedef, leaf),
                    (weights and _only(treedef, weights, leaf), extra_args),
                )
                for leaf in range(treedef.num_leaves)
            ]
            directions, state = (merge(list(parts)) for parts in zip(*pieces, strict=True))
        return rebox(updates, treedef.flatten_up_to(directions)), state

    return optax.GradientTransformationExtraArgs(init_fn, sharded_alike(update_fn, updates_like))


def scale_by_adam8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    nesterov: bool = False,
    block: int = 256,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Adam whose moments take one byte each: `quantized_state(optax.scale_by_adam(...))`.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment, after bias correction.
      eps_root: Added to the second moment under the root, after bias correction.
      nesterov: Whether the first moment looks ahead.
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
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov)
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


def _whole(
    inner: optax.GradientTransformationExtraArgs,
    gradients: list[Any],
    state: Any,
    weights: list[Any] | None,
    extra_args: dict[str, Any],
    treedef: Any,
) -> tuple[Any, Any]:
    """All leaves at once."""
    wide = _decoded(state, treedef)
    directions, wide = inner.update(
        treedef.unflatten(map(_wide, gradients)),
        wide,
        weights and treedef.unflatten(weights),
        **extra_args,
    )
    narrow = jax.tree.map(lambda d, g: d.astype(g.dtype), directions, treedef.unflatten(gradients))
    return narrow, encode_state_like(wide, state, treedef)


def _piece(
    program: Entrywise, leaf: int, treedef: Any, gradient: Any, state: Any, rest: Any
) -> tuple[Any, Any]:
    """One leaf, or any layers of it."""
    wide = jax.tree.map(_wide, gradient), _decoded(state, treedef)
    (shape,) = (x.shape for x in jax.tree.leaves(gradient))
    results = program.run(leaf, shape, list(map(jnp.asarray, jax.tree.leaves((wide, rest)))))
    directions, new = jax.tree.unflatten(jax.tree.structure(wide), results)
    narrow = jax.tree.map(lambda d, g: d.astype(g.dtype), directions, gradient)
    return narrow, encode_state_like(new, state, treedef)


def _entrywise(
    inner: optax.GradientTransformationExtraArgs,
    gradients: list[Any],
    state: Any,
    weights: list[Any] | None,
    extra_args: dict[str, Any],
    treedef: Any,
) -> Entrywise | None:
    """`inner.update` as a program for pieces; None if none is needed, or possible."""
    if all(piece_of(jnp.shape(gradient)) is None for gradient in gradients):
        return None
    if not all(_is_scalar(x) for x in jax.tree.leaves(extra_args)):
        return None
    wide = jax.eval_shape(lambda stored: _decoded(stored, treedef), state)
    numbered = map_moments(
        wide,
        treedef,
        lambda leaf, moments: moments._replace(
            first=dict.fromkeys(moments.first, leaf), second=dict.fromkeys(moments.second, leaf)
        ),
    )
    owners = [x if isinstance(x, int) else None for x in jax.tree.leaves(numbered)]
    if any(o is None and x.ndim for o, x in zip(owners, jax.tree.leaves(wide), strict=True)):
        return None  # it keeps arrays of unknown meaning
    leaves = list(range(treedef.num_leaves))
    shapes = jax.eval_shape(lambda xs: list(map(_wide, xs)), gradients)
    return entrywise(
        lambda g, s, w, extra: inner.update(g, s, w, **extra),
        (
            treedef.unflatten(shapes),
            wide,
            weights and treedef.unflatten(weights),
            extra_args,
        ),
        inputs=[*leaves, *owners, *(leaves if weights else ()), *(None for _ in extra_args)],
        outputs=[*leaves, *owners],
    )


def _is_scalar(x: Any) -> bool:
    return isinstance(x, int | float | jax.Array) and jnp.ndim(x) == 0


def _decoded(state: Any, treedef: Any) -> Any:
    return map_moments(state, treedef, lambda _, moments: decoded(moments))


def _check_storage(state: Any, treedef: Any, paths: list[str], bits: int, block: int) -> None:
    def check(leaf: int, moments: Moments) -> Moments:
        for x in (*moments.first.values(), *moments.second.values()):
            if isinstance(x, power.PowerArray) and (x.bits, x.block) != (bits, block):
                raise ValueError(
                    f"leaf {paths[leaf]!r}: its moments are stored in {x.bits} bits and blocks of "
                    f"{x.block}, but this transformation has {bits} bits and blocks of {block}. "
                    "Restore with the old values or init anew."
                )
        return moments

    map_moments(state, treedef, check)


def _check_has_moments(state: Any, treedef: Any) -> None:
    differs = [
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByRStdDevState))
        if isinstance(x, optax.ScaleByRStdDevState)
    ]
    if differs:
        raise TypeError(
            "scale_by_stddev takes the root of its second moment less the square of the first, "
            "which rounding makes negative: use scale_by_rms or scale_by_adam in few bits."
        )
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
