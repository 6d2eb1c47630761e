"""An update in pieces, so that only a piece of the decoded state is alive.

Decoding all moments, updating them and encoding them again would keep several full-precision copies
of the whole state in memory at once: the compiler has no reason to finish one leaf before it starts
the next. A loop over the pieces of each large leaf leaves it no choice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.quant.power import block_axis
from galore_jax.views.leaves import is_one_leaf

# Entries of a piece: enough to keep all cores busy, few beside any model.
PIECE = 2**21

# (updates, stored state, params or None) -> (updates, stored state), on trees with one leaf.
Update = Callable[[Any, Any, Any], tuple[Any, Any]]


def piece_of(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Axis to cut a leaf along, and the length of a piece; None if it stays whole.

    A stack is cut along its first axis, a matrix along the axis that no block runs along.
    """
    size = math.prod(shape)
    if len(shape) < 2 or size <= PIECE:
        return None
    axis = 0 if len(shape) > 2 or block_axis(shape) == -1 else 1
    length = shape[axis]
    room = max(PIECE * length // size, 1)
    return axis, next(d for d in range(min(room, length), 0, -1) if length % d == 0)


def streamed(update: Update, gradient: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """`update` of one leaf, piece by piece, in the place of its gradient and its state.

    Args:
      update: Acts on any slice of the leaf.
      gradient: Tree with one leaf.
      state: Stored state with that leaf alone.
      params: Tree like `gradient`, or None.

    Returns:
      What ``update(gradient, state, params)`` returns.
    """
    (leaf,) = jax.tree.leaves(gradient)
    piece = piece_of(leaf.shape)
    if piece is None:
        return update(gradient, state, params)
    axis, length = piece
    cut = functools.partial(_cut, axis=axis, length=length)

    def body(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        start = i * length
        new = update(*(cut(tree, start=start) for tree in (*carry, params)))
        return jax.tree.map(functools.partial(_paste, start=start, axis=axis), carry, new)

    zero = jnp.zeros((), jnp.int32)
    # Scalars do not depend on arrays, and advance once, not once per piece.
    _, scalars = update(*(cut(tree, start=zero) for tree in (gradient, state, params)))
    count = leaf.shape[axis] // length
    result, arrays = jax.lax.fori_loop(0, count, body, (gradient, state))
    return result, jax.tree.map(lambda a, s: a if a.ndim else s, arrays, scalars)


def merge(trees: list[Any]) -> Any:
    """One tree from trees with one leaf each; scalars from the first."""

    def pick(*parts: Any) -> Any:
        return next((x for x in parts if not isinstance(x, optax.MaskedNode)), parts[0])

    return jax.tree.map(
        pick, *trees, is_leaf=lambda x: isinstance(x, optax.MaskedNode) or is_one_leaf(x)
    )


def _cut(tree: Any, *, start: jax.Array, axis: int, length: int) -> Any:
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, start, length, axis) if x.ndim else x, tree
    )


def _paste(whole: jax.Array, part: jax.Array, *, start: jax.Array, axis: int) -> jax.Array:
    if not whole.ndim:
        return whole
    return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis)
