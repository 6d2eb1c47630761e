"""What becomes of a gradient that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.layerwise.update import Finite
from galore_jax.transforms import AccumulateState
from galore_jax.views.leaves import flatten_leaves, leaf_paths, rebox

# (gradients, finite) -> the gradients that the update gets, and what it is to take for finite.
Guard = Callable[[Any, Finite], tuple[Any, Finite]]

_WINDOWS = (AccumulateState, optax.MultiStepsState)


def guard_for(opt_state: Any) -> Guard:
    """How a state is kept from gradients that are not finite.

    A state that is made from one gradient stays what it was. A sum over micro-batches must not, or
    the first gradient of a window would meet the sum of the window before it: there, what is not
    finite counts as zero.
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, _WINDOWS))
    return _dropped if any(isinstance(node, _WINDOWS) for node in nodes) else _kept


def _kept(gradients: Any, finite: Finite) -> tuple[Any, Finite]:
    return gradients, finite


def _dropped(gradients: Any, finite: Finite) -> tuple[Any, Finite]:
    leaves, _ = flatten_leaves(gradients)
    zeroed = [
        jax.tree.map(lambda x, fine=fine: jnp.where(fine, x, jnp.zeros((), x.dtype)), leaf)
        for fine, leaf in zip(
            (finite(frozenset([path])) for path in leaf_paths(gradients)), leaves, strict=True
        )
    ]
    return rebox(gradients, zeroed), lambda names: finite(frozenset())
