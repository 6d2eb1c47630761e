"""Bytes of weights and optimizer state, by what they are for and by leaf."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.leaves import Leaves, abstract
from galore_jax.tables import aligned, bytes_text, shape_text
from galore_jax.transforms.lenses import abstract_state
from galore_jax.transforms.state_tree import state_arrays


@dataclasses.dataclass(frozen=True)
class Roles:
    """Bytes by role.

    Args:
      weights: Of the parameters, as they are stored.
      projectors: Stored bases of all lenses.
      moments: Of the transformations inside the lenses for projected leaves, in the subspace.
      full_rank: Of any transformation for a leaf at full size.
      refresh: Flags and counts of the bases, and what refresh policies remember.
      other: Counts, windows of `galore_jax.accumulate`, and whatever belongs to no leaf.
    """

    weights: int = 0
    projectors: int = 0
    moments: int = 0
    full_rank: int = 0
    refresh: int = 0
    other: int = 0

    @property
    def state(self) -> int:
        """Bytes of the optimizer state."""
        return self.total - self.weights

    @property
    def total(self) -> int:
        """Bytes of weights and optimizer state."""
        return sum(_by_role(self).values())


@dataclasses.dataclass(frozen=True)
class LeafMemory(Roles):
    """Bytes of one parameter and of the state that is its own.

    Args:
      path: "/"-joined path of the leaf; None for what belongs to no single one.
      shape: Its shape.
    """

    path: str | None = None
    shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Memory(Roles):
    """Bytes by role; prints as a table in decimal units.

    Args:
      leaves: The same for every leaf, and for what belongs to none; they sum up to the whole.
    """

    leaves: tuple[LeafMemory, ...] = ()

    def __str__(self) -> str:
        rows = [*_by_role(self).items(), ("total", self.total)]
        return "\n".join(f"{_title(name):<12} {bytes_text(size):>10}" for name, size in rows)

    def by_leaf(self) -> str:
        """A table with a row for every leaf, and a column for every role that something has."""
        roles = [name for name, size in _by_role(self).items() if size]
        header = ("path", "shape", *map(_title, roles), "total")
        named = [
            ("(of no leaf)", "", leaf)
            if leaf.path is None
            else (leaf.path, shape_text(leaf.shape), leaf)
            for leaf in self.leaves
        ]
        rows = [
            (*name, *(bytes_text(getattr(row, role)) for role in roles), bytes_text(row.total))
            for *name, row in [*named, ("total", "", self)]
        ]
        return "\n".join(aligned([header, *rows]))


def estimate(tx: optax.GradientTransformation, params: Any) -> Memory:
    """Bytes that training `params` with `tx` keeps between two steps. Allocates nothing.

    Gradients, activations and temporaries are not in it.

    Args:
      tx: Any optax transformation.
      params: Parameters or their `ShapeDtypeStruct`s; leaves may be `quant.QuantizedArray`s.

    Returns:
      A `Memory`; print it, or its `by_leaf()`, or read its fields.

    Example:
      >>> import jax, jax.numpy as jnp, galore_jax as gj
      >>> params = jax.eval_shape(lambda: {"w": jnp.ones((4096, 11008), jnp.bfloat16)})
      >>> memory = gj.memory.estimate(gj.galore_adamw8bit(1e-2, rank=1024), params)
      >>> print(memory)  # doctest: +ELLIPSIS
      weights         90.2 MB
      projectors       8.4 MB
      moments         22.9 MB
      full rank           0 B
      refresh ... B
      other               8 B
      total          121.5 MB
    """
    return report(abstract_state(tx, Leaves.of(params)), params)


def report(opt_state: Any, params: Any) -> Memory:
    """Bytes of a state and of parameters that exist.

    Args:
      opt_state: State of any optax transformation.
      params: Its parameters.

    Returns:
      A `Memory`.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> params = {"norm": jnp.ones(64), "w": jnp.ones((64, 128))}
      >>> state = gj.galore_adamw(1e-2, rank=8).init(params)
      >>> for leaf in gj.memory.report(state, params).leaves:
      ...     print(leaf.path, leaf.weights, leaf.projectors, leaf.moments, leaf.full_rank)
      norm 256 4 0 512
      w 32768 2048 8192 0
      None 0 0 0 0
    """
    leaves = Leaves.of(params)
    sizes: collections.defaultdict[int | None, collections.Counter[str]] = collections.defaultdict(
        collections.Counter
    )
    for array in jax.tree.leaves(state_arrays(opt_state, leaves)):
        for owner, size in array.shares.items():
            sizes[owner][array.role] += size
    rows = [
        LeafMemory(path=path, shape=like.shape, weights=tree_bytes(leaf), **sizes[number])
        for number, (path, like, leaf) in enumerate(
            zip(leaves.paths, leaves.shapes, leaves.values, strict=True)
        )
    ]
    rows.append(LeafMemory(path=None, shape=(), **sizes[None]))
    totals = {name: sum(getattr(row, name) for row in rows) for name in _by_role(rows[-1])}
    return Memory(leaves=tuple(rows), **totals)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    arrays = map(abstract, jax.tree.leaves(tree))
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)


def _by_role(memory: Roles) -> dict[str, int]:
    return {field.name: getattr(memory, field.name) for field in dataclasses.fields(Roles)}


def _title(name: str) -> str:
    return name.replace("_", " ")
