"""Derivatives through a function forwards, but not backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def forwards_only(fn: Callable[[Any], Any], message: str) -> Callable[[Any], Any]:
    """A function that raises where a derivative comes back through it.

    Its derivatives in forward mode are those of `fn`. In reverse mode a program can be traced, and
    raises when it runs and gets here: under a conditional, where that branch is taken.

    Args:
      fn: A function of a pytree of arrays.
      message: The text of the error.
    """

    def refuse(is_used: Any) -> Any:
        if np.any(is_used):
            raise ValueError(message)
        return np.zeros(np.shape(is_used), np.float32)

    @jax.custom_jvp
    def call(args: Any) -> Any:
        return fn(args)

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        leaves, treedef = jax.tree.flatten(primals[0])
        floating = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]
        inputs = [leaves[i] for i in floating]
        directions = [jax.tree.leaves(tangents[0])[i] for i in floating]

        def of_floating(*values: Any) -> list[Any]:
            given = list(leaves)
            for i, value in zip(floating, values, strict=True):
                given[i] = value
            results = jax.tree.leaves(fn(treedef.unflatten(given)))
            return [x for x in results if jnp.issubdtype(x.dtype, jnp.inexact)]

        def along(directions: Any) -> Any:
            return jax.jvp(of_floating, inputs, directions)[1]

        # (x, y) -> (x, y + J x), the solution of a triangular system: the one linear map that can
        # be given a transpose of its own and be mapped over as well.
        def solve(_: Any, pair: Any) -> Any:
            return pair[0], jax.tree.map(jnp.add, pair[1], along(pair[0]))

        def matvec(pair: Any) -> Any:
            return pair[0], jax.tree.map(jnp.subtract, pair[1], along(pair[0]))

        def transposed(_: Any, pair: Any) -> Any:
            is_used = [jnp.any(x != 0) for x in pair[1]]
            is_used = jnp.any(jnp.stack(is_used)) if is_used else jnp.zeros((), bool)
            zero = jax.ShapeDtypeStruct((), jnp.float32)
            zero = jax.pure_callback(refuse, zero, is_used, vmap_method="expand_dims")
            return [x + zero.astype(x.dtype) for x in pair[0]], pair[1]

        result = call(primals[0])
        parts, structure = jax.tree.flatten(result)
        places = [i for i, x in enumerate(parts) if jnp.issubdtype(x.dtype, jnp.inexact)]
        pair = directions, [jnp.zeros_like(parts[i]) for i in places]
        moved = jax.lax.custom_linear_solve(matvec, pair, solve, transposed, symmetric=True)[1]
        out = [np.zeros(x.shape, jax.dtypes.float0) for x in parts]
        for i, x in zip(places, moved, strict=True):
            out[i] = x
        return result, structure.unflatten(out)

    return call
