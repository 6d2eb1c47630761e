"""What a transformation does to every leaf of a model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from galore_jax.describe.arrays import Placed, StateArray, names_text, placed, state_arrays
from galore_jax.describe.table import bytes_text, paths_text, shape_text, spec_text, table_lines
from galore_jax.transforms.lenses import find_lenses, own_params
from galore_jax.views import LeafPlan, leaf_plan
from galore_jax.views.leaves import abstract, flatten_leaves, leaf_paths, rebox
from galore_jax.views.shardings import shardings_per_leaf
from galore_jax.views.specs import axis_names, entry_of, flattened, full_spec


@dataclasses.dataclass(frozen=True)
class LeafSharding:
    """How one leaf and its state lie on a mesh.

    Args:
      spec: Of the parameter, one entry per axis.
      basis: Of its stored basis; None if it is not projected.
      moments: Of the largest of its other arrays; None if there is none.
      state_bytes: Bytes of its state on one device.
      notes: What is replicated although the leaf is sharded, and why.
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
      sharding: How it lies on a mesh; None if no shardings were given.
    """

    path: str
    shape: tuple[int, ...]
    projected: bool
    side: str
    rank: int
    state_bytes: int
    reason: str
    sharding: LeafSharding | None = None


@dataclasses.dataclass(frozen=True)
class Description:
    """All rows; prints as a table."""

    rows: tuple[LeafDescription, ...]

    def __str__(self) -> str:
        placements = [row.sharding for row in self.rows if row.sharding is not None]
        total = (
            f"{len(self.rows)} leaves, state {bytes_text(sum(r.state_bytes for r in self.rows))}"
        )
        if not placements:
            return "\n".join([*table_lines(_HEADER, list(map(_cells, self.rows))), total])
        total += f", {bytes_text(sum(p.state_bytes for p in placements))} per device"
        cells = list(map(_sharded_cells, self.rows, placements))
        notes = _footnotes(self.rows, placements)
        return "\n".join([*table_lines(_SHARDED_HEADER, cells), total, *notes])


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
    """What `tx` does to every leaf of `params`: projected or not, side, rank, bytes of state.

    Allocates nothing; `tx` may be any chain with any number of lenses in it. An array of the state
    is counted for the parameter whose path ends its own.

    With shardings, the table shows how `state_sharding` lays the state out and the bytes on one
    device; lines below it say what is replicated although the parameter is not, and why.

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
      path   shape     projected  side   rank  state      why
      -----  --------  ---------  -----  ----  ---------  -----------------------------
      embed  (512,64)  no                      256.0 KiB  embedding, head, norm or bias
      up     (64,256)  yes        input  16    36.0 KiB   projected
      2 leaves, state 292.0 KiB
      >>> from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec as P
      >>> fsdp = NamedSharding(AbstractMesh((4,), ("fsdp",)), P("fsdp"))
      >>> params = {"down": jnp.zeros((256, 64)), "up": jnp.zeros((64, 256))}
      >>> print(gj.describe(tx, params, {"down": fsdp, "up": fsdp}))
      path  shape     spec      side    rank  basis     moments   per device  why
      ----  --------  --------  ------  ----  --------  --------  ----------  ---------
      down  (256,64)  (fsdp,-)  output  16    (-,-)     (fsdp,-)  12.0 KiB    projected
      up    (64,256)  (fsdp,-)  input   16    (fsdp,-)  (-,-)     33.0 KiB    projected
      2 leaves, state 72.0 KiB, 45.0 KiB per device
      down: projectors replicated over fsdp, where the kept axis is
      up: mu, nu replicated over fsdp, where the projected axis is (spread=True)
    """
    leaves, _ = flatten_leaves(params)
    paths = leaf_paths(params)
    shapes = rebox(params, list(map(abstract, leaves)))
    state = jax.eval_shape(tx.init, shapes)
    plans, arrays = _plans(state, shapes), state_arrays(state, paths)
    rows = [
        _row(path, abstract(leaf), plans.get(path), [a for a in arrays if a.owner == path])
        for path, leaf in zip(paths, leaves, strict=True)
    ]
    if params_sharding is None or not rows:
        return Description(tuple(rows))
    shardings = shardings_per_leaf(params, params_sharding)
    on_mesh = placed(arrays, state, shapes, shardings, spread=spread)
    return Description(
        tuple(
            dataclasses.replace(
                row,
                sharding=_leaf_sharding(
                    len(row.shape),
                    sharding,
                    plans.get(row.path),
                    [p for p in on_mesh if p.array.owner == row.path],
                ),
            )
            for row, sharding in zip(rows, shardings, strict=True)
        )
    )


def _plans(state: Any, params: Any) -> dict[str, LeafPlan]:
    """The plan of every leaf, from the lens that has it (under `partition` there are several)."""
    plans: dict[str, LeafPlan] = {}
    for lens in find_lenses(state):
        own = leaf_plan(lens.config, own_params(lens, params))
        plans.update({plan.path: plan for plan in own})
    return plans


def _row(
    path: str, leaf: jax.ShapeDtypeStruct, plan: LeafPlan | None, arrays: list[StateArray]
) -> LeafDescription:
    size = sum(array.nbytes for array in arrays)
    if plan is None or plan.view is None:
        reason = "not seen by a lens" if plan is None else plan.reason
        return LeafDescription(path, leaf.shape, False, "", 0, size, reason)
    side = "input" if plan.view.projects_input else "output"
    return LeafDescription(path, leaf.shape, True, side, plan.rank, size, plan.reason)


def _leaf_sharding(
    ndim: int, sharding: NamedSharding, plan: LeafPlan | None, arrays: list[Placed]
) -> LeafSharding:
    bases = [p for p in arrays if p.array.is_basis]
    moments = [p for p in arrays if p.array.is_moment]
    return LeafSharding(
        spec=full_spec(sharding.spec, ndim),
        basis=_spec_of_largest(bases),
        moments=_spec_of_largest(moments),
        state_bytes=sum(p.nbytes for p in arrays),
        notes=(*_notes_of_plan(sharding.spec, plan), *_notes(arrays)),
    )


def _spec_of_largest(arrays: list[Placed]) -> PartitionSpec | None:
    if not arrays:
        return None
    largest = max(arrays, key=lambda p: p.array.nbytes)
    return full_spec(largest.sharding.spec, len(largest.array.shape))


def _notes_of_plan(spec: PartitionSpec, plan: LeafPlan | None) -> list[str]:
    """What follows from the matrix view, whatever the mesh."""
    if plan is None or plan.view is None:
        return []
    notes = []
    for side, axes in (("projected", plan.view.projected), ("kept", plan.view.kept)):
        given = [name for axis in axes for name in axis_names(entry_of(spec, axis))]
        used = axis_names(flattened(axes, spec))
        if len(used) < len(given):
            notes.append(
                f"nothing is sharded over {names_text(given)}: axes {axes} form the {side} axis, "
                "and only the first of them may be sharded"
            )
        elif used and side == "kept":
            notes.append(f"projectors replicated over {names_text(used)}, where the kept axis is")
    return notes


def _notes(arrays: list[Placed]) -> list[str]:
    """The notes of all arrays, those that several have in common once."""
    who: dict[str, list[str]] = {}
    for placement in arrays:
        for note in placement.notes:
            who.setdefault(note, []).append(placement.array.name)
    return [f"{', '.join(dict.fromkeys(names))} {note}" for note, names in who.items()]


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


def _sharded_cells(row: LeafDescription, sharding: LeafSharding) -> tuple[str, ...]:
    path, shape, _, side, rank, _, reason = _cells(row)
    specs = (spec_text(spec) for spec in (sharding.spec, sharding.basis, sharding.moments))
    spec, basis, moments = specs
    size = bytes_text(sharding.state_bytes)
    return path, shape, spec, side, rank, basis, moments, size, reason


def _footnotes(rows: tuple[LeafDescription, ...], placements: list[LeafSharding]) -> list[str]:
    """What is replicated and why, leaves with the same note on one line."""
    who: dict[str, list[str]] = {}
    for row, sharding in zip(rows, placements, strict=True):
        for note in sharding.notes:
            who.setdefault(note, []).append(row.path)
    return [f"{paths_text(paths)}: {note}" for note, paths in who.items()]
