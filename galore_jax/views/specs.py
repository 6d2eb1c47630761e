"""Entries of partition specs: of axes flattened together, of axes that the mesh divides."""

from __future__ import annotations

import math
from typing import Any

from jax.sharding import PartitionSpec

# One entry of a PartitionSpec: no mesh axis, one, or several.
Entry = Any


def flattened(axes: tuple[int, ...], spec: PartitionSpec) -> Entry:
    """Entry of several axes flattened into one: that of the first, if the others are whole.

    Only then is a shard of the flattened axis one piece.
    """
    if not axes:
        return None
    first, *others = (entry_of(spec, axis) for axis in axes)
    return None if any(axis_names(entry) for entry in others) else first


def joined(first: Entry, second: Entry) -> Entry:
    """Entry over the mesh axes of both."""
    return _entry(axis_names(first) + axis_names(second))


def entry_of(spec: PartitionSpec, axis: int) -> Entry:
    """Entry of one axis; specs may be shorter than the array."""
    return spec[axis] if axis < len(spec) else None


def full_spec(spec: PartitionSpec, ndim: int) -> PartitionSpec:
    """The spec with an entry for every axis."""
    return PartitionSpec(*(entry_of(spec, axis) for axis in range(ndim)))


def axis_names(entry: Entry) -> tuple[str, ...]:
    """Mesh axes of an entry."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def that_divides(
    spec: PartitionSpec, shape: tuple[int, ...], mesh_shape: dict[str, int]
) -> PartitionSpec:
    """The spec with each entry cut to the leading mesh axes that divide the array's axis."""
    pairs = zip(shape, spec, strict=False)  # specs may be shorter
    return PartitionSpec(*(_cut(entry, size, mesh_shape) for size, entry in pairs))


def shards(entry: Entry, mesh_shape: dict[str, int]) -> int:
    """Number of pieces that an entry cuts an axis into."""
    return math.prod(mesh_shape[name] for name in axis_names(entry))


def _cut(entry: Entry, size: int, mesh_shape: dict[str, int]) -> Entry:
    names = axis_names(entry)
    while size % shards(names, mesh_shape):
        names = names[:-1]
    return entry if names == axis_names(entry) else _entry(names)


def _entry(names: tuple[str, ...]) -> Entry:
    return names if len(names) > 1 else next(iter(names), None)
