"""Where an axis of an operand is in the result, primitive by primitive."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

# (equation, number of the operand, its axis, layers along it) -> axis of every result in which
# entry i is made from entry i of the operand alone; None if there is no such axis.
Rule = Callable[[Any, int, int, int], int | None]

_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil
    clamp complex conj convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp
    exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max
    mesh_cast min mul mulhi ne neg nextafter not optimization_barrier or pcast pmax pmin
    population_count pow psum psum_invariant pvary real reduce_precision rem reshard round rsqrt
    select_n sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin
    sinh sqrt square stop_gradient sub tan tanh xor
""".split()  # noqa: SIM905
_REDUCTIONS = """
    argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor
""".split()  # noqa: SIM905
_CUMULATIVE = "cumsum cumprod cummax cummin cumlogsumexp".split()  # noqa: SIM905
_ON_LAST_TWO = "cholesky eigh lu qr householder_product svd triangular_solve".split()  # noqa: SIM905


def _same(eqn: Any, operand: int, axis: int, layers: int) -> int | None:
    shape, result = eqn.invars[operand].aval.shape, eqn.outvars[0].aval.shape
    return axis if shape[axis : axis + 1] == result[axis : axis + 1] else None


def _reduce(eqn: Any, operand: int, axis: int, layers: int) -> int | None:
    axes = eqn.params["axes"]
    return None if axis in axes else axis - sum(a < axis for a in axes)


def _cumulative(eqn: Any, operand: int, axis: int, layers: int) -> int | None:
    return None if axis == eqn.params["axis"] else axis


def _broadcast(eqn: Any, operand: int, axis: int, layers: int) -> int | None:
    target = eqn.params["broadcast_dimensions"][axis]
    same = eqn.params["shape"][target] == eqn.invars[operand].aval.shape[axis]
    return target if same else None


def _transpose(eqn: Any, operand: int, axis: int, layers: int) -> int | None:
    return eqn.params["permutation"].index(axis)


def _squeeze(eqn: Any, operand: int, axis: int, layers: int) -> int | None:
    return _reduce_like(eqn.params["dimensions"], axis)


def _reduce_like(removed: tuple[int, ...], axis: int) -> int | None:
    return None if axis in removed else axis - sum(a < axis for a in removed)


def _reshape(eqn: Any, operand: int, axis: int, layers: int) -> int | None:
    """The axis may be merged with others behind it, or split off again: layers come first in it."""
    old, new = eqn.invars[operand].aval.shape, eqn.outvars[0].aval.shape
    if eqn.params["dimensions"] is not None:
        return None
    before = math.prod(old[:axis])
    fits = (
        target
        for target, size in enumerate(new)
        if math.prod(new[:target]) == before and size % layers == 0
    )
    return next(fits, None)


def _dot(eqn: Any, operand: int, axis: int, layers: int) -> int | None:
    contract, batch = eqn.params["dimension_numbers"]
    if axis in contract[operand]:
        return None
    if axis in batch[operand]:
        return batch[operand].index(axis)
    ranks = [len(var.aval.shape) for var in eqn.invars]
    free = [
        [a for a in range(rank) if a not in (*contract[k], *batch[k])]
        for k, rank in enumerate(ranks)
    ]
    return len(batch[0]) + free[operand].index(axis) + (len(free[0]) if operand else 0)


def _concatenate(eqn: Any, operand: int, axis: int, layers: int) -> int | None:
    return None if axis == eqn.params["dimension"] else axis


def _stack(eqn: Any, operand: int, axis: int, layers: int) -> int | None:
    return axis + (axis >= eqn.params["axis"])


def _split(eqn: Any, operand: int, axis: int, layers: int) -> int | None:
    return None if axis == eqn.params["axis"] else axis


def _pad(eqn: Any, operand: int, axis: int, layers: int) -> int | None:
    return axis if operand == 0 and eqn.params["padding_config"][axis] == (0, 0, 0) else None


def _slice(eqn: Any, operand: int, axis: int, layers: int) -> int | None:
    return _same(eqn, operand, axis, layers)  # all of it, or it has another length


def _rev(eqn: Any, operand: int, axis: int, layers: int) -> int | None:
    return None if axis in eqn.params["dimensions"] else axis


def _sort(eqn: Any, operand: int, axis: int, layers: int) -> int | None:
    return None if axis == eqn.params["dimension"] else axis


def _leading(eqn: Any, operand: int, axis: int, layers: int) -> int | None:
    return axis if axis < len(eqn.invars[operand].aval.shape) - 2 else None


def _top_k(eqn: Any, operand: int, axis: int, layers: int) -> int | None:
    return axis if axis < len(eqn.invars[operand].aval.shape) - 1 else None


AXIS_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _same),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(_CUMULATIVE, _cumulative),
    **dict.fromkeys(_ON_LAST_TWO, _leading),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "dot_general": _dot,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "top_k": _top_k,
    "transpose": _transpose,
}
