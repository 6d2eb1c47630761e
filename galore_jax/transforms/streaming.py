"""An update in pieces, so that only a piece of the decoded state is alive.

Decoding all moments, updating them and encoding them again would keep several full-precision copies
of the whole state in memory at once: the compiler has no reason to finish one leaf before it starts
the next. A loop over the layers of each large stack leaves it no choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Entries of a piece: enough to keep all cores busy, few beside any model.
PIECE = 2**21


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


def streamed(step: Callable[..., Any], gradient: Any, state: Any, *rest: Any) -> tuple[Any, Any]:
    """Updates one large stack piece by piece, in the place of its gradient and its state.

    Args:
      step: ``(gradient, state, *rest) -> (update, new state)`` of any piece.
      gradient: Tree with one array, ``[layers, ...]``.
      state: Scalars, and arrays ``[layers, ...]``.
      rest: Scalars and arrays ``[layers, ...]`` that are only read.

    Returns:
      What ``step(gradient, state, *rest)`` returns, but scalars of the state stay as they were.
    """
    ((layers, *matrix),) = (x.shape for x in jax.tree.leaves(gradient))
    length = piece_of((layers, *matrix))
    assert length is not None

    def body(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        def cut(x: Any) -> Any:
            return jax.lax.dynamic_slice_in_dim(x, i * length, length) if jnp.ndim(x) else x

        def paste(x: jax.Array, new: jax.Array) -> jax.Array:
            if not jnp.ndim(x):
                return x
            return jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), i * length, 0)

        return jax.tree.map(paste, carry, step(*jax.tree.map(cut, (*carry, *rest))))

    return jax.lax.fori_loop(0, layers // length, body, (gradient, state))
