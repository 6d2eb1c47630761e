"""Bytes of weights and optimizer state, by what they are for and by leaf."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import optax

from galore_jax.memory.parts import parts, tree_bytes
from galore_jax.views.leaves import abstract, flatten_leaves, leaf_paths


@dataclasses.dataclass(frozen=True)
class Roles:
    """Bytes by role.

    Args:
      weights: Of the parameters, as they are stored.
      projectors: Stored bases of all lenses.
      moments: What the transformations inside the lenses keep of projected leaves, in the subspace.
      full_rank: What any transformation keeps of a leaf at full size.
      refresh: Which bases are due, and what refresh policies remember.
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
        return "\n".join(f"{_title(name):<12} {_text(size):>10}" for name, size in rows)

    def by_leaf(self) -> str:
        """A table with a row for every leaf, and a column for every role that something has."""
        roles = [name for name, size in _by_role(self).items() if size]
        header = ("path", "shape", *map(_title, roles), "total")
        named = [(leaf.path or "(of no leaf)", _shape(leaf), leaf) for leaf in self.leaves]
        rows = [
            (*name, *(_text(getattr(row, role)) for role in roles), _text(row.total))
            for *name, row in [*named, ("total", "", self)]
        ]
        return "\n".join(_aligned([header, *rows]))


def estimate(tx: optax.GradientTransformation, params: Any) -> Memory:
    """What training `params` with `tx` keeps between two steps. Allocates nothing.

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
      >>> params = {"norm": jnp.ones(64), "w": jnp.ones((64, 128))}
      >>> state = gj.galore_adamw(1e-2, rank=8).init(params)
      >>> for leaf in gj.memory.report(state, params).leaves:
      ...     print(leaf.path, leaf.weights, leaf.projectors, leaf.moments, leaf.full_rank)
      norm 256 4 0 512
      w 32768 2048 8192 0
      None 0 0 0 0
    """
    leaves, _ = flatten_leaves(params)
    sizes: collections.defaultdict[str | None, collections.Counter[str]] = collections.defaultdict(
        collections.Counter
    )
    for part in parts(opt_state, params):
        sizes[part.owner][part.role] += part.nbytes
    rows = [
        LeafMemory(path=path, shape=abstract(leaf).shape, weights=tree_bytes(leaf), **sizes[path])
        for path, leaf in zip(leaf_paths(params), leaves, strict=True)
    ]
    rows.append(LeafMemory(path=None, shape=(), **sizes[None]))
    return Memory(leaves=tuple(rows), **_sum(rows))


def _by_role(memory: Roles) -> dict[str, int]:
    return {field.name: getattr(memory, field.name) for field in dataclasses.fields(Roles)}


def _sum(rows: Sequence[Roles]) -> dict[str, int]:
    total: collections.Counter[str] = collections.Counter()
    for row in rows:
        total.update(_by_role(row))
    return dict(total)


def _title(name: str) -> str:
    return name.replace("_", " ")


def _shape(leaf: LeafMemory) -> str:
    return "" if leaf.path is None else "(" + ",".join(map(str, leaf.shape)) + ")"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _text(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
