"""The table that a person wants: what happens to every leaf of a model."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from galore_jax.leaves import Leaves
from galore_jax.tables import bytes_text, paths_text, shape_text, table_lines
from galore_jax.transforms.lenses import abstract_state
from galore_jax.transforms.state import low_rank_states
from galore_jax.transforms.state_tree import (
    FULL_RANK,
    MOMENTS,
    OTHER,
    PROJECTORS,
    StateArray,
    lens_on,
    likes_of,
    sharding_of,
    spec_of,
    state_arrays,
)
from galore_jax.views import LeafPlan
from galore_jax.views.shardings import shardings_per_leaf
from galore_jax.views.specs import axis_names, entry_of, flattened, full_spec, shards


@dataclasses.dataclass(frozen=True)
class LeafSharding:
    """One leaf and its state on a mesh.

    Args:
      spec: Of the parameter, one entry per axis.
      basis: Of its stored basis; None if it is not projected.
      moments: Of the largest of its other arrays; None if there is none.
      state_bytes: Bytes of its state on one device.
      notes: Parts that are replicated although the leaf is sharded, and why.
    """

    spec: PartitionSpec
    basis: PartitionSpec | None
    moments: PartitionSpec | None
    state_bytes: int
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LeafDescription:
    """One row of the table.

    Args:
      path: "/"-joined path of the leaf.
      shape: Its shape.
      projected: Whether it is projected.
      side: "input" or "output", the side that is projected; empty if it is not.
      rank: Effective rank; 0 if it is not projected.
      state_bytes: Bytes of the optimizer state that belong to this leaf.
      reason: Why it is projected, or why not.
      is_matrix: Whether it is a matrix by shape and name: one that GaLore means to project.
      sharding: Its layout on a mesh; None if no shardings were given.
    """

    path: str
    shape: tuple[int, ...]
    projected: bool
    side: str
    rank: int
    state_bytes: int
    reason: str
    is_matrix: bool = False
    sharding: LeafSharding | None = None


@dataclasses.dataclass(frozen=True)
class Description:
    """All rows; prints as a table.

    Args:
      rows: One per leaf.
      state_bytes: Bytes of the whole state, flags and counts included.
      adamw_bytes: Bytes of the state of `optax.adamw` for the same parameters.
    """

    rows: tuple[LeafDescription, ...]
    state_bytes: int = 0
    adamw_bytes: int = 0

    def __str__(self) -> str:
        placements = [row.sharding for row in self.rows if row.sharding is not None]
        header, cells = (_SHARDED_HEADER, _sharded_cells) if placements else (_HEADER, _cells)
        lines = table_lines(header, list(map(cells, _grouped(self.rows)))) if self.rows else []
        lines.append(self._total(placements))
        return "\n".join([*lines, *_footnotes(self.rows, placements)])

    def _total(self, placements: Sequence[LeafSharding]) -> str:
        matrices = sum(row.is_matrix or row.projected for row in self.rows)
        share = round(100 * self.state_bytes / self.adamw_bytes) if self.adamw_bytes else 0
        local = bytes_text(sum(sharding.state_bytes for sharding in placements))
        return (
            f"{sum(row.projected for row in self.rows)} of {matrices} matrices projected; state "
            f"{bytes_text(self.state_bytes)}, AdamW {bytes_text(self.adamw_bytes)} ({share} %)"
        ) + (f"; {local} per device" if placements else "")


_HEADER = ("path", "shape", "projected", "side", "rank", "state", "why")
_SHARDED_HEADER = (
    "path", "shape", "spec", "side", "rank", "basis", "moments", "per device", "why",
)  # fmt: skip


def describe(
    tx: optax.GradientTransformation,
    params: Any,
    params_sharding: Any = None,
    *,
    spread: bool = False,
) -> Description:
    """Table of what `tx` does to every leaf: projected or not, side, rank, bytes of state.

    Allocates nothing; `tx` may be any chain with any number of lenses in it. Equal layers share a
    line. Below the table stand the matrices that are projected, and the bytes of the state beside
    those of `optax.adamw` for the same parameters.

    With shardings, the table shows how `state_sharding` lays the state out and the bytes on one
    device; lines below it name what is replicated although the parameter is not, and why.

    Args:
      tx: An optax transformation.
      params: Parameters, or their `ShapeDtypeStruct`s.
      params_sharding: Tree like `params` with a `NamedSharding` for each leaf; or None.
      spread: As in `state_sharding`.

    Returns:
      A `Description`; print it for the table, or read its `rows`.

    Raises:
      ValueError: Shardings that do not fit the parameters.
      TypeError: A sharding is not a `NamedSharding`.

    Example:
      >>> import jax, jax.numpy as jnp, galore_jax as gj
      >>> params = {"embed": jnp.zeros((512, 64)), "up": jnp.zeros((64, 256))}
      >>> tx = gj.galore_adamw(1e-2, rank=16)
      >>> print(gj.describe(tx, params))
      path   shape     projected  side   rank  state     why
      -----  --------  ---------  -----  ----  --------  -----------------
      embed  (512,64)  no                      262.1 kB  embedding (embed)
      up     (64,256)  yes        input  16    36.9 kB   projected
      1 of 1 matrices projected; state 299.0 kB, AdamW 393.2 kB (76 %)
      >>> from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec as P
      >>> fsdp = NamedSharding(AbstractMesh((4,), ("fsdp",)), P("fsdp"))
      >>> params = {"down": jnp.zeros((256, 64)), "up": jnp.zeros((64, 256))}
      >>> print(gj.describe(tx, params, {"down": fsdp, "up": fsdp}))
      path  shape     spec      side    rank  basis     moments   per device  why
      ----  --------  --------  ------  ----  --------  --------  ----------  ---------
      down  (256,64)  (fsdp,-)  output  16    (-,-)     (fsdp,-)  12.3 kB     projected
      up    (64,256)  (fsdp,-)  input   16    (fsdp,-)  (-,-)     33.8 kB     projected
      2 of 2 matrices projected; state 73.8 kB, AdamW 262.1 kB (28 %); 46.1 kB per device
      down: projectors replicated over fsdp, where the kept axis is
      up: mu, nu replicated over fsdp, where the projected axis is (spread=True)
    """
    leaves = Leaves.of(params)
    state, plans = abstract_state(tx, leaves), {}
    likes = likes_of(leaves)
    for node in low_rank_states(state):
        lens, owners = lens_on(node, likes)
        plans.update({like.owner: plan for like, plan in zip(owners, lens.plans, strict=True)})
    arrays = jax.tree.leaves(state_arrays(state, leaves))
    own = [[a for a in arrays if i in a.shares] for i in range(len(leaves.values))]
    rows = [
        _row(leaves.paths[i], like, plans.get(i), sum(a.shares[i] for a in own[i] if a.shape))
        for i, like in enumerate(leaves.shapes)
    ]
    if params_sharding is not None and rows:
        shardings = shardings_per_leaf(params, params_sharding)
        for i, row in enumerate(rows):
            layout = _leaf_sharding(row, shardings[i], plans.get(i), shardings, own[i], spread)
            rows[i] = dataclasses.replace(row, sharding=layout)
    adamw = abstract_state(optax.scale_by_adam(), leaves)
    return Description(
        tuple(rows),
        sum(array.nbytes for array in arrays),
        sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(adamw)),
    )


def _row(
    path: str, leaf: jax.ShapeDtypeStruct, plan: LeafPlan | None, size: int
) -> LeafDescription:
    if plan is None:
        return LeafDescription(path, leaf.shape, False, "", 0, size, "not seen by a lens")
    side = "" if plan.view is None else "input" if plan.view.projects_input else "output"
    return LeafDescription(
        path, leaf.shape, plan.is_projected, side, plan.rank, size, plan.reason, plan.is_matrix
    )


def _leaf_sharding(
    row: LeafDescription,
    sharding: NamedSharding,
    plan: LeafPlan | None,
    shardings: list[NamedSharding],
    arrays: list[StateArray],
    spread: bool,
) -> LeafSharding:
    placed = {a: sharding_of(a, shardings, spread=spread) for a in arrays}

    def largest(roles: Sequence[str]) -> PartitionSpec | None:
        mine = [array for array in arrays if array.role in roles and array.shape]
        array = max(mine, key=lambda array: array.nbytes, default=None)
        return None if array is None else full_spec(placed[array].spec, len(array.shape))

    who: dict[str, list[str]] = {}
    for array in arrays:
        wanted = [spec_of(array, shardings, spread=s) for s in (spread, True)]
        got, most = placed[array], sharding_of(array, shardings, spread=True)
        for note in [*_undivided(array, wanted[0], got), *_idle(wanted, got == most)]:
            who.setdefault(note, []).append(array.name)
    notes = [f"{', '.join(dict.fromkeys(names))} {note}" for note, names in who.items()]
    return LeafSharding(
        spec=full_spec(sharding.spec, len(row.shape)),
        basis=largest([PROJECTORS]),
        moments=largest([MOMENTS, FULL_RANK, OTHER]),
        state_bytes=sum(
            math.prod(placed[array].shard_shape(array.shape))
            * array.dtype.itemsize
            // len(array.shares)
            for array in arrays
            if array.shape  # no placeholders
        ),
        notes=(*_notes_of_plan(sharding.spec, plan), *notes),
    )


def _idle(wanted: list[PartitionSpec], is_best: bool) -> list[str]:
    """Mesh axes over which an array is replicated that `spread` would use."""
    spec, most = ({name for entry in s for name in axis_names(entry)} for s in wanted)
    idle = sorted(most - spec)
    if not idle:
        return []
    remedy = "no other axis is divisible" if is_best else "spread=True"
    return [f"replicated over {'+'.join(idle)}, where the projected axis is ({remedy})"]


def _undivided(array: StateArray, wanted: PartitionSpec, got: NamedSharding) -> list[str]:
    """The axes that the mesh does not divide."""
    sizes, notes = dict(got.mesh.shape), []
    for axis, size in enumerate(array.shape):
        want = entry_of(wanted, axis)
        lost = axis_names(want)[len(axis_names(entry_of(got.spec, axis))) :]
        if lost:
            notes.append(
                f"axis {axis} is replicated over {'+'.join(lost)}: {shards(want, sizes)} shards "
                f"do not divide {size}"
            )
    return notes


def _notes_of_plan(spec: PartitionSpec, plan: LeafPlan | None) -> list[str]:
    """Consequences of the matrix view, whatever the mesh."""
    if plan is None or plan.view is None:
        return []
    notes = []
    for side, axes in (("projected", plan.view.projected), ("kept", plan.view.kept)):
        given = [name for axis in axes for name in axis_names(entry_of(spec, axis))]
        used = axis_names(flattened(axes, spec))
        if len(used) < len(given):
            notes.append(
                f"nothing is sharded over {'+'.join(given)}: axes {axes} form the {side} axis, "
                "and only the first of them may be sharded"
            )
        elif used and side == "kept":
            notes.append(f"projectors replicated over {'+'.join(used)}, where the kept axis is")
    return notes


def _grouped(rows: Sequence[LeafDescription]) -> list[LeafDescription]:
    """One row for leaves that differ in the numbers of their paths only; bytes are those of all."""
    groups: dict[Any, list[LeafDescription]] = {}
    for row in rows:
        key = re.sub(r"\d+", "#", row.path), dataclasses.replace(row, path="")
        groups.setdefault(key, []).append(row)
    return [_together(group) for group in groups.values()]


def _together(rows: list[LeafDescription]) -> LeafDescription:
    sharding, count = rows[0].sharding, len(rows)
    if count == 1:
        return rows[0]
    if sharding is not None:
        sharding = dataclasses.replace(sharding, state_bytes=count * sharding.state_bytes)
    return dataclasses.replace(
        rows[0],
        path=f"{_range([row.path for row in rows])} (x{count})",
        state_bytes=count * rows[0].state_bytes,
        sharding=sharding,
    )


def _range(paths: list[str]) -> str:
    """``layers/{0..31}/w``, from the paths of equal layers."""
    numbers = zip(*(map(int, re.findall(r"\d+", path)) for path in paths), strict=True)
    ranges = iter(
        [f"{{{min(one)}..{max(one)}}}" if len(set(one)) > 1 else str(one[0]) for one in numbers]
    )
    return re.sub(r"\d+", lambda _: next(ranges), paths[0])


def _cells(row: LeafDescription) -> tuple[str, ...]:
    return (
        row.path,
        shape_text(row.shape),
        "yes" if row.projected else "no",
        row.side,
        str(row.rank) if row.projected else "",
        bytes_text(row.state_bytes),
        row.reason,
    )


def _sharded_cells(row: LeafDescription) -> tuple[str, ...]:
    path, shape, _, side, rank, _, reason = _cells(row)
    sharding = row.sharding
    assert sharding is not None
    spec, basis, moments = map(_spec_text, (sharding.spec, sharding.basis, sharding.moments))
    return path, shape, spec, side, rank, basis, moments, bytes_text(sharding.state_bytes), reason


def _spec_text(spec: PartitionSpec | None) -> str:
    """One entry per axis, "-" for an axis that is whole; nothing without a spec."""
    if spec is None:
        return ""
    return "(" + ",".join("+".join(axis_names(entry)) or "-" for entry in spec) + ")"


def _footnotes(rows: Sequence[LeafDescription], placements: Sequence[LeafSharding]) -> list[str]:
    """Leaves with parts that are replicated, those with the same note on one line."""
    who: dict[str, list[str]] = {}
    for row, sharding in zip(rows, placements, strict=False):  # without a mesh there are none
        for note in sharding.notes:
            who.setdefault(note, []).append(row.path)
    return [f"{paths_text(paths)}: {note}" for note, paths in who.items()]
