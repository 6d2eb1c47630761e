"""Bytes of weights and optimizer state, by what they are for."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.transforms.lenses import find_lenses
from galore_jax.views.leaves import abstract, flatten_leaves


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes by role; prints as a table in decimal units.

    Args:
      weights: Of the parameters, as they are stored.
      projectors: Stored bases of all lenses.
      inner_state: What the transformations inside the lenses keep: moments, and their scales.
      refresh: Flags, counts and what refresh policies remember.
      other_state: Everything outside the lenses.
    """

    weights: int
    projectors: int
    inner_state: int
    refresh: int
    other_state: int

    @property
    def state(self) -> int:
        """Bytes of the optimizer state."""
        return self.projectors + self.inner_state + self.refresh + self.other_state

    @property
    def total(self) -> int:
        """Bytes of weights and optimizer state."""
        return self.weights + self.state

    def __str__(self) -> str:
        rows = [*dataclasses.asdict(self).items(), ("total", self.total)]
        return "\n".join(f"{name.replace('_', ' '):<12} {_text(size):>10}" for name, size in rows)


def estimate(tx: optax.GradientTransformation, params: Any) -> Memory:
    """What training `params` with `tx` keeps between two steps. Allocates nothing.

    Gradients, activations and temporaries are not in it.

    Args:
      tx: Any optax transformation.
      params: Parameters or their `ShapeDtypeStruct`s; leaves may be `quant.QuantizedArray`s.

    Returns:
      A `Memory`; print it, or read its fields.

    Example:
      >>> import jax, jax.numpy as jnp, galore_jax as gj
      >>> params = jax.eval_shape(lambda: {"w": jnp.ones((4096, 11008), jnp.bfloat16)})
      >>> print(gj.memory.estimate(gj.galore_adamw8bit(1e-2, rank=1024), params))
      weights         90.2 MB
      projectors       8.4 MB
      inner state     22.9 MB
      refresh             9 B
      other state         4 B
      total          121.5 MB
    """
    leaves, treedef = flatten_leaves(params)
    state = jax.eval_shape(tx.init, treedef.unflatten(map(abstract, leaves)))
    return report(state, params)


def report(opt_state: Any, params: Any) -> Memory:
    """Bytes of a state and of parameters that exist.

    Args:
      opt_state: State of any optax transformation.
      params: Its parameters.

    Returns:
      A `Memory`.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> params = {"w": jnp.ones((64, 128))}
      >>> state = gj.galore_adamw(1e-2, rank=8).init(params)
      >>> gj.memory.report(state, params).projectors
      2048
    """
    lenses = find_lenses(opt_state)
    projectors = sum(_bytes(lens.projectors) for lens in lenses)
    inner_state = sum(_bytes(lens.inner_state) for lens in lenses)
    refresh = sum(_bytes(lens.refresh_state) for lens in lenses)
    return Memory(
        weights=_bytes(params),
        projectors=projectors,
        inner_state=inner_state,
        refresh=refresh,
        other_state=_bytes(opt_state) - projectors - inner_state - refresh,
    )


def _bytes(tree: Any) -> int:
    """Bytes of all arrays; scalars that stand where a leaf has nothing count as well."""
    arrays = map(abstract, jax.tree.leaves(tree))
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)


def _text(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
