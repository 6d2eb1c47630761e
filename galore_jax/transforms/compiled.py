"""Updates that are compiled once, also where they run outside of a jitted step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def compiled_once(update: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """An `update` under `jax.jit`, where it is not under one already.

    Closures of a conditional are made anew at every call, and would be compiled anew. An extra
    argument that is no array, such as a function for a line search, leaves the update as it is.
    """
    compiled = jax.jit(update)

    def once(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        arrays = jax.Array | np.ndarray | np.generic | float | int
        are_arrays = all(isinstance(x, arrays) for x in jax.tree.leaves(extra_args))
        leaves = jax.tree.leaves((updates, state, params, extra_args))
        is_traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
        run = compiled if are_arrays and not is_traced else update
        return run(updates, state, params, **extra_args)

    return once
