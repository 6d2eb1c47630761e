"""Functions whose derivatives are refused, but only where one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.collectives import varying_axes


def without_derivative(fn: Callable[[Any], Any], message: str) -> Callable[[Any], Any]:
    """A function that raises when a derivative goes through it, in forward or in reverse mode.

    A program that differentiates it can be traced and compiled. It raises when it runs and a
    tangent or cotangent that is not zero gets here: under a conditional, where that branch is
    taken.

    Args:
      fn: A function of a pytree of arrays.
      message: Text of the error.
    """

    def refuse(is_used: Any) -> Any:
        if np.any(is_used):
            raise ValueError(message)
        return np.zeros(np.shape(is_used), np.float32)

    def refused(given: list[Any], others: list[Any]) -> list[Any]:
        """`others`, unless something that is given is not zero."""
        is_used = jnp.any(jnp.stack([jnp.any(x != 0) for x in given]))
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        zero = jax.pure_callback(refuse, shape, is_used, vmap_method="expand_dims")
        return [x + zero.astype(x.dtype) for x in others]

    @jax.custom_jvp
    def call(args: Any) -> Any:
        return fn(args)

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        result = call(*primals)
        parts, treedef = jax.tree.flatten(result)
        floating = [i for i, x in enumerate(parts) if jnp.issubdtype(x.dtype, jnp.inexact)]
        given = [x for x in jax.tree.leaves(tangents) if x.dtype != jax.dtypes.float0]
        out: list[Any] = [np.zeros(x.shape, jax.dtypes.float0) for x in parts]
        if given and floating:
            # As the solution of a linear system: the one linear map with a transpose of its own
            # that can be mapped over. It asks that all parts depend on the tangents.
            nothing = jnp.sum(jnp.stack([0 * jnp.sum(x).astype(jnp.float32) for x in given]))
            pair = given, [jnp.zeros_like(parts[i]) for i in floating]
            pair = jax.tree.map(lambda x: x + nothing.astype(x.dtype), pair)
            _, found = jax.lax.custom_linear_solve(
                lambda pair: pair,
                pair,
                solve=lambda _, pair: (pair[0], refused(*pair)),
                transpose_solve=lambda _, pair: (refused(pair[1], pair[0]), pair[1]),
                symmetric=True,
            )
            for i, x in zip(floating, found, strict=True):
                out[i] = x
        return result, jax.tree.unflatten(treedef, out)

    # A custom derivative makes all results of a `jax.shard_map` vary over the axes of any argument.
    return lambda args: fn(args) if varying_axes(args, ()) else call(args)
