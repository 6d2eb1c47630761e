"""The arrays of a state, each with the parameter that it belongs to."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from galore_jax.transforms.state_specs import state_specs
from galore_jax.views.leaves import is_leaf, leaf_paths, unboxed
from galore_jax.views.shardings import sharding_that_divides
from galore_jax.views.specs import axis_names, entry_of, shards


@dataclasses.dataclass(frozen=True)
class StateArray:
    """One array of a state.

    Args:
      owner: Path of the parameter whose path ends its own; None for scalars, which nobody owns.
      field: Where in the state, up to the owner's path: ``0/inner_state/mu``.
      part: Which part of a stored leaf it is (``codes``), or nothing.
      shape: Its shape.
      itemsize: Bytes of an entry.
    """

    owner: str | None
    field: str
    part: str
    shape: tuple[int, ...]
    itemsize: int

    @property
    def name(self) -> str:
        """What a person calls it: ``mu``, ``projectors.codes``."""
        return ".".join(filter(None, (self.field.split("/")[-1], self.part)))

    @property
    def is_basis(self) -> bool:
        return "projectors" in self.field.split("/")

    @property
    def is_moment(self) -> bool:
        """Kept by the inner transformation, or by one outside of all lenses."""
        return not self.is_basis and "refresh_state" not in self.field.split("/")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


@dataclasses.dataclass(frozen=True)
class Placed:
    """One array on a mesh.

    Args:
      array: Which one.
      sharding: How it is sharded.
      notes: What of it is replicated although it could be sharded, and why.
    """

    array: StateArray
    sharding: NamedSharding
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """On one device."""
        return math.prod(self.sharding.shard_shape(self.array.shape)) * self.array.itemsize


def state_arrays(state: Any, paths: list[str]) -> list[StateArray]:
    """All arrays of a state, in flattening order.

    Args:
      state: State of any transformation, or its shapes.
      paths: Of the parameters.

    Returns:
      A `StateArray` for each.
    """
    owners, found = set(paths), []
    nodes = jax.tree.leaves(state, is_leaf=is_leaf)
    for path, node in zip(leaf_paths(state), nodes, strict=True):
        parts = path.split("/")
        # A lone array has the path "".
        tails = (("/".join(parts[i:]), "/".join(parts[:i])) for i in range(len(parts) + 1))
        owner, field = next((tail for tail in tails if tail[0] in owners), (None, path))
        for key, array in jax.tree_util.tree_leaves_with_path(unboxed(node)):
            part = jax.tree_util.keystr(key, simple=True, separator=".")
            mine = owner if array.ndim else None  # not counts, flags and placeholders
            found.append(StateArray(mine, field, part, array.shape, array.dtype.itemsize))
    return found


def placed(
    arrays: list[StateArray],
    state: Any,
    params: Any,
    shardings: list[NamedSharding],
    *,
    spread: bool,
) -> list[Placed]:
    """The arrays of `state` on the mesh of its parameters.

    Args:
      arrays: `state_arrays` of `state`.
      state: State of any transformation, or its shapes.
      params: Its parameters, or their `ShapeDtypeStruct`s.
      shardings: One per leaf of `params`.
      spread: See `galore_jax.state_sharding`.

    Returns:
      A `Placed` for each array.
    """
    mesh, specs = shardings[0].mesh, [sharding.spec for sharding in shardings]
    wanted = jax.tree.leaves(state_specs(state, params, specs, spread=spread))
    at_most = jax.tree.leaves(state_specs(state, params, specs, spread=True))

    def place(array: StateArray, spec: PartitionSpec, most: PartitionSpec) -> Placed:
        got, best = (
            sharding_that_divides(NamedSharding(mesh, s), array.shape) for s in (spec, most)
        )
        notes = _undivided(array, spec, got)
        idle = _names(most) - _names(spec)
        if idle:
            where = f"{names_text(sorted(idle))}, where the projected axis is"
            remedy = "spread=True" if got != best else "no other axis is divisible"
            notes.append(f"replicated over {where} ({remedy})")
        return Placed(array, got, tuple(notes))

    return list(map(place, arrays, wanted, at_most))


def _undivided(array: StateArray, wanted: PartitionSpec, got: NamedSharding) -> list[str]:
    """The axes that the mesh does not divide."""
    sizes, notes = dict(got.mesh.shape), []
    for axis, size in enumerate(array.shape):
        want, have = entry_of(wanted, axis), entry_of(got.spec, axis)
        lost = axis_names(want)[len(axis_names(have)) :]
        if lost:
            notes.append(
                f"axis {axis} is replicated over {names_text(lost)}: {shards(want, sizes)} shards "
                f"do not divide {size}"
            )
    return notes


def _names(spec: PartitionSpec) -> set[str]:
    """All mesh axes in a spec."""
    return {name for entry in spec for name in axis_names(entry)}


def names_text(names: Any) -> str:
    """Mesh axes in a table."""
    return "+".join(names)
