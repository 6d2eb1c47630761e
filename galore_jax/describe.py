"""The table a person wants: what happens to every leaf of a model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import optax

from galore_jax.transforms.lenses import find_lenses, own_params
from galore_jax.views import LeafPlan, leaf_plan
from galore_jax.views.leaves import abstract, flatten_leaves, is_leaf, leaf_paths


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
    """

    path: str
    shape: tuple[int, ...]
    projected: bool
    side: str
    rank: int
    state_bytes: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Description:
    """All rows; prints as a table."""

    rows: tuple[LeafDescription, ...]

    def __str__(self) -> str:
        header = ("path", "shape", "projected", "side", "rank", "state", "why")
        table = [header, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        total = sum(row.state_bytes for row in self.rows)
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, f"{len(self.rows)} leaves, state {_bytes(total)}"])


def describe(tx: optax.GradientTransformation, params: Any) -> Description:
    """What `tx` does to every leaf of `params`: projected or not, side, rank, bytes of state.

    Allocates nothing; `tx` may be any chain with any number of lenses in it. An array of the state
    is counted for the parameter whose path ends its own.

    Args:
      tx: An optax transformation.
      params: Parameters, or their `ShapeDtypeStruct`s.

    Returns:
      A `Description`; print it for the table, or read its `rows`.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> params = {"embed": jnp.zeros((512, 64)), "up": jnp.zeros((64, 256))}
      >>> print(gj.describe(gj.galore_adamw(1e-2, rank=16), params))
      path   shape     projected  side   rank  state      why
      -----  --------  ---------  -----  ----  ---------  -----------------------------
      embed  (512,64)  no                      256.0 KiB  embedding, head, norm or bias
      up     (64,256)  yes        input  16    36.0 KiB   projected
      2 leaves, state 292.0 KiB
    """
    leaves, treedef = flatten_leaves(params)
    paths = leaf_paths(params)
    shapes = treedef.unflatten(map(abstract, leaves))
    state = jax.eval_shape(tx.init, shapes)
    plans = _plans(state, shapes)
    sizes = _bytes_per_leaf(state, paths)
    return Description(
        tuple(
            _row(path, leaf, plans.get(path), sizes[path])
            for path, leaf in zip(paths, jax.tree.leaves(shapes), strict=True)
        )
    )


def _plans(state: Any, params: Any) -> dict[str, LeafPlan]:
    """The plan of every leaf, from the lens that has it (under `partition` there are several)."""
    plans: dict[str, LeafPlan] = {}
    for lens in find_lenses(state):
        own = leaf_plan(lens.config, own_params(lens, params))
        plans.update({plan.path: plan for plan in own})
    return plans


def _bytes_per_leaf(state: Any, paths: list[str]) -> dict[str, int]:
    """Sums the state's arrays by the parameter whose path ends their own."""
    sizes = dict.fromkeys(paths, 0)
    nodes = jax.tree.leaves(state, is_leaf=is_leaf)
    for path, node in zip(leaf_paths(state), nodes, strict=True):
        arrays = [array for array in jax.tree.leaves(node) if array.ndim > 0]
        if not arrays:
            continue  # counts, flags and placeholders
        parts = path.split("/")
        tails = ("/".join(parts[i:]) for i in range(len(parts) + 1))  # a lone array has path ""
        owner = next((tail for tail in tails if tail in sizes), None)
        if owner is not None:
            sizes[owner] += sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    return sizes


def _row(
    path: str, leaf: jax.ShapeDtypeStruct, plan: LeafPlan | None, size: int
) -> LeafDescription:
    if plan is None or plan.view is None:
        reason = "not seen by a lens" if plan is None else plan.reason
        return LeafDescription(path, leaf.shape, False, "", 0, size, reason)
    side = "input" if plan.view.projects_input else "output"
    return LeafDescription(path, leaf.shape, True, side, plan.rank, size, plan.reason)


def _cells(row: LeafDescription) -> tuple[str, ...]:
    return (
        row.path,
        "(" + ",".join(map(str, row.shape)) + ")",
        "yes" if row.projected else "no",
        row.side,
        str(row.rank) if row.projected else "",
        _bytes(row.state_bytes),
        row.reason,
    )


def _bytes(size: int) -> str:
    if size < 1024:
        return f"{size} B"
    power = min(int(math.log2(size)) // 10, 3)
    return f"{size / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"
