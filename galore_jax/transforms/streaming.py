"""An update in pieces, so that only a piece of the decoded state is alive.

Decoding all moments, updating them and encoding them again would keep several full-precision copies
of the whole state in memory at once: the compiler has no reason to finish one leaf before it starts
the next. A loop over the layers of each large stack leaves it no choice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.views.leaves import is_one_leaf

# Entries of a piece: enough to keep all cores busy, few beside any model.
PIECE = 2**21

# (gradient, stored state, the rest) -> (update, stored state), of any piece of one leaf.
Update = Callable[[Any, Any, Any], tuple[Any, Any]]


def piece_of(shape: tuple[int, ...]) -> int | None:
    """Layers of a stack that are updated at a time; None if a leaf stays whole.

    Only stacks are cut, along their first axis, which no mesh shards: a slice of a sharded axis
    would have to be gathered.
    """
    size = math.prod(shape)
    if len(shape) < 3 or size <= PIECE:
        return None
    room = max(PIECE * shape[0] // size, 1)
    return next(d for d in range(min(room, shape[0]), 0, -1) if shape[0] % d == 0)


def streamed(update: Update, gradient: Any, state: Any, rest: Any) -> tuple[Any, Any]:
    """`update` of one leaf, piece by piece, in the place of its gradient and its state.

    Args:
      update: Acts on any piece of the leaf.
      gradient: Tree with one leaf.
      state: Stored state with that leaf alone.
      rest: What else it reads: the same leaf of the parameters, and scalars.

    Returns:
      What ``update(gradient, state, rest)`` returns.
    """
    (leaf,) = jax.tree.leaves(gradient)
    length = piece_of(leaf.shape)
    if length is None:
        return update(gradient, state, rest)
    cut = functools.partial(_cut, length=length)

    def body(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        start = i * length
        new = update(*(cut(tree, start=start) for tree in (*carry, rest)))
        return jax.tree.map(functools.partial(_paste, start=start), carry, new)

    zero = jnp.zeros((), jnp.int32)
    # Scalars do not depend on arrays, and advance once, not once per piece.
    _, scalars = update(*(cut(tree, start=zero) for tree in (gradient, state, rest)))
    result, arrays = jax.lax.fori_loop(0, leaf.shape[0] // length, body, (gradient, state))
    return result, jax.tree.map(lambda a, s: a if a.ndim else s, arrays, scalars)


def merge(trees: list[Any]) -> Any:
    """One tree from trees with one leaf each; scalars from the first."""

    def pick(*parts: Any) -> Any:
        return next((x for x in parts if not isinstance(x, optax.MaskedNode)), parts[0])

    return jax.tree.map(
        pick, *trees, is_leaf=lambda x: isinstance(x, optax.MaskedNode) or is_one_leaf(x)
    )


def _cut(tree: Any, *, start: jax.Array, length: int) -> Any:
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, start, length) if jnp.ndim(x) else x, tree
    )


def _paste(whole: jax.Array, part: jax.Array, *, start: jax.Array) -> jax.Array:
    if not whole.ndim:
        return whole
    return jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0)
