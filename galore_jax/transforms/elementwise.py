"""Whether a transformation treats every entry of every leaf by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

_ELEMENTWISE = frozenset(
    [
        "abs",
        "add",
        "and",
        "cbrt",
        "ceil",
        "clamp",
        "convert_element_type",
        "copy",
        "div",
        "eq",
        "erf",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "integer_pow",
        "is_finite",
        "le",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "not",
        "or",
        "pow",
        "reduce_precision",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "sign",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tanh",
        "xor",
    ]
)
_CALLS = frozenset(["jit", "pjit", "closed_call", "custom_jvp_call"])

# Number of the leaf that an array belongs to; None for a scalar, or the same number everywhere.
Owner = int | None


class _Coupled(Exception):
    """Entries meet."""


def is_elementwise(
    fn: Callable[..., Any], args: Any, owners: Sequence[Owner], expected: Sequence[Owner]
) -> bool:
    """Whether every entry that `fn` returns depends on the same entry of the same leaf alone.

    Then `fn` of slices is the slice of `fn`. Scalars may enter everywhere; they must not depend on
    arrays. Looks at the traced program, and errs on the side of no.

    Args:
      fn: A function of pytrees.
      args: Tuple of its arguments, or of their `ShapeDtypeStruct`s.
      owners: The leaf that each array of `args` belongs to.
      expected: The leaf that each array of the result belongs to.
    """
    closed = jax.make_jaxpr(fn)(*args)
    if any(getattr(const, "ndim", 0) > 0 for const in closed.consts):
        return False
    try:
        results = _owners(closed.jaxpr, owners)
    except _Coupled:
        return False
    return all(found in (None, wanted) for found, wanted in zip(results, expected, strict=True))


def _owners(jaxpr: core.Jaxpr, inputs: Sequence[Owner]) -> list[Owner]:
    """Owners of the outputs; raises `_Coupled` where entries meet."""
    known: dict[Any, Owner] = dict(zip(jaxpr.invars, inputs, strict=True))

    def owner(atom: Any) -> Owner:
        return None if isinstance(atom, core.Literal) else known.get(atom)

    for equation in jaxpr.eqns:
        operands = [owner(atom) for atom in equation.invars]
        involved = set(operands) - {None}
        body = _body(equation)
        if body is not None:
            results = _owners(body, operands)
        elif equation.primitive.name in _ELEMENTWISE and len(involved) <= 1:
            results = [next(iter(involved), None)] * len(equation.outvars)
        elif involved or not _is_uniform(equation):
            raise _Coupled
        else:
            results = [None] * len(equation.outvars)
        known.update(zip(equation.outvars, results, strict=True))
    return [owner(atom) for atom in jaxpr.outvars]


def _body(equation: Any) -> core.Jaxpr | None:
    """The body of an equation that does nothing but call it."""
    if equation.primitive.name not in _CALLS:
        return None
    body = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    if isinstance(body, core.ClosedJaxpr):
        return None if body.consts else body.jaxpr
    return body


def _is_uniform(equation: Any) -> bool:
    """Whether what it makes out of scalars is the same number everywhere."""
    if all(not var.aval.shape for var in equation.outvars):
        return True
    return equation.primitive.name == "broadcast_in_dim" and all(
        not atom.aval.shape for atom in equation.invars
    )
