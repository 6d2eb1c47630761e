"""Updates that are compiled once, also where they run outside of a jitted step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def compiled_once(update: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """An `update` under `jax.jit`: closures of a conditional made anew would be compiled anew.

    An extra argument that is no array, such as a function for a line search, leaves it as it is.
    """
    compiled = jax.jit(update)

    def once(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        arrays = jax.Array | np.ndarray | np.generic | float | int
        are_arrays = all(isinstance(x, arrays) for x in jax.tree.leaves(extra_args))
        return (compiled if are_arrays else update)(updates, state, params, **extra_args)

    return once
