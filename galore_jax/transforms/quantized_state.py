"""Moments of any transformation, stored in 8 bits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.checks import check_count, check_transformation
from galore_jax.leaves import Leaves, is_one_leaf
from galore_jax.meshes import preserve_sharding
from galore_jax.quant import dequantize, power
from galore_jax.transforms.projected import updates_like
from galore_jax.transforms.streaming import piece_of, streamed
from galore_jax.transport.moments import (
    Moments,
    decoded,
    elementwise_fields,
    encoded_like,
    map_moments,
    registered_states,
    without_moments,
)


def quantized_state(
    inner: optax.GradientTransformation, *, block: int = 256, min_size: int = 4096
) -> optax.GradientTransformationExtraArgs:
    """Stores the moments of `inner` in 8 bits between two updates.

    Moments are decoded, updated by `inner` in fp32, and encoded again: blocks of codes with one
    scale each, whose square root (first moments, signed) or fourth root (second moments, positive)
    lies on a uniform grid. Which fields are moments is known for optax's common states, and can be
    declared with `galore_jax.transport.register_moment`. The update of a step is computed from
    moments that have not been rounded yet. Blocks run along the longer one of the last two axes.

    Large stacks of layers are updated in pieces, so that only a piece of the decoded moments is
    alive, if `inner` is one transformation whose state is declared elementwise, such as Adam, Lion
    or momentum. A chain is updated as a whole, because a part of it that keeps no state may couple
    entries, as a clip by global norm does: wrap its moments alone, and chain the rest around them.

    Works alone, inside `low_rank_projection` with any transport, and inside `optax.partition`.

    Args:
      inner: A transformation that keeps moments.
      block: Entries per block; each has a scale of 4 bytes.
      min_size: Moments with fewer entries stay as they are.

    Returns:
      A transformation with the state of `inner`, in which `quant.PowerArray`s take the place of
      large moments. To `optax.tree_map_params` moments are not like parameters.

    Raises:
      TypeError: `block` or `min_size` is no integer; in `init`, when `inner` keeps no moment
        that is known.
      ValueError: `block` is below one; in `update`, when the state was stored with another.

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
    check_transformation("inner", inner)
    block = check_count("block", block)
    min_size = check_count("min_size", min_size, least=0)
    inner = optax.with_extra_args_support(inner)

    def encode(x: jax.Array, signed: bool) -> Any:
        small = x.ndim == 0 or x.size < max(min_size, 1)
        if small or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        along_rows = x.ndim == 1 or x.shape[-2] <= x.shape[-1]  # the longer one of the last two
        return power.encode(x, signed=signed, block=block, axis=-1 if along_rows else -2)

    def encode_leaf(leaf: int, moments: Moments) -> Moments:
        del leaf
        return moments._replace(
            first={name: encode(x, True) for name, x in moments.first.items()},
            second={name: encode(x, False) for name, x in moments.second.items()},
        )

    def init_fn(params: optax.Params) -> Any:
        leaves = Leaves.of(params)
        state = inner.init(leaves.tree(list(map(_wide, leaves.values))))
        if not leaves.values:
            # optax.tree_map_params asks with such a tree which fields are like parameters, and
            # codes are not.
            return without_moments(state)
        _check_inner(state)
        return map_moments(state, leaves.treedef, encode_leaf)

    def step(gradients: Any, state: Any, params: Any, extra_args: Any) -> tuple[Any, Any]:
        """`inner.update` on a state as it is stored."""
        wide = (jax.tree.map(_wide, x, is_leaf=is_one_leaf) for x in (gradients, params))
        directions, new = inner.update(next(wide), decoded(state), next(wide), **extra_args)
        narrow = jax.tree.map(lambda d, g: d.astype(g.dtype), directions, gradients)
        return narrow, encoded_like(new, state)

    # Made once, so that calls outside of `jit` compile it once.
    step_in_pieces = jax.jit(functools.partial(streamed, step))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        leaves = Leaves.of(updates)
        gradients = list(leaves.values)
        if not gradients:
            return updates, state
        _check_blocks(state, leaves, block)
        weights = None if params is None else Leaves.of(params).values
        fields = elementwise_fields(state) if all(map(_is_scalar, extra_args.values())) else ()
        stacks = [i for i, x in enumerate(gradients) if fields and piece_of(jnp.shape(x))]
        if not stacks:
            whole = weights and leaves.tree(weights)
            directions, state = step(leaves.tree(gradients), state, whole, extra_args)
            return leaves.boxed(leaves.split(directions)), state

        columns = {name: leaves.split(getattr(state, name)) for name in fields}

        def update_leaves(run: Any, some: list[int]) -> Any:
            """Updates some leaves in place; returns their new state."""
            part = state._replace(**{name: [xs[i] for i in some] for name, xs in columns.items()})
            own = weights and [weights[i] for i in some]
            directions, new = run([gradients[i] for i in some], part, own, extra_args)
            for place, leaf in enumerate(some):
                gradients[leaf] = directions[place]
                for name, column in columns.items():
                    column[leaf] = getattr(new, name)[place]
            return new

        # Scalars advance once, here: pieces leave them as they are.
        new = update_leaves(step, [i for i in range(len(gradients)) if i not in stacks])
        for stack in stacks:
            update_leaves(step_in_pieces, [stack])
        moments = {name: leaves.tree(column) for name, column in columns.items()}
        return leaves.boxed(gradients), new._replace(**moments)

    return optax.GradientTransformationExtraArgs(
        init_fn, preserve_sharding(update_fn, updates_like)
    )


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


def _is_scalar(x: Any) -> bool:
    return isinstance(x, int | float | jax.Array) and jnp.ndim(x) == 0


def _check_blocks(state: Any, leaves: Leaves, block: int) -> None:
    def check(leaf: int, moments: Moments) -> Moments:
        for x in (*moments.first.values(), *moments.second.values()):
            if isinstance(x, power.PowerArray) and x.block != block:
                raise ValueError(
                    f"leaf {leaves.paths[leaf]!r}: its moments are stored in blocks of {x.block}, "
                    f"but this transformation has blocks of {block}. Restore with the old value or "
                    "init anew."
                )
            if isinstance(x, power.PowerArray) and x.codes.dtype != jnp.uint8:
                raise ValueError(
                    f"leaf {leaves.paths[leaf]!r}: codes of its moments are {x.codes.dtype}, not "
                    "uint8: something did arithmetic on the optimizer state (an average, a cast). "
                    "Leave states with few bits alone, or keep moments in floats."
                )
        return moments

    map_moments(state, leaves.treedef, check)


def _check_inner(state: Any) -> None:
    found = registered_states(state)
    if any(isinstance(x, optax.ScaleByRStdDevState) for x in found):
        raise TypeError(
            "scale_by_stddev takes the root of its second moment less the square of the first, "
            "which rounding makes negative: use scale_by_rms or scale_by_adam in few bits."
        )
    if not found:
        raise TypeError(
            "quantized_state found no moments in the state of its inner transformation. Tell "
            "galore_jax.transport.register_moment which fields of its state are moments."
        )
