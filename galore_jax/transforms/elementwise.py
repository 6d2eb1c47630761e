"""Transformations that treat every entry of every leaf by itself, as programs for any piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

_ELEMENTWISE = frozenset(
    """
    abs add and cbrt ceil clamp convert_element_type copy div eq erf exp exp2 expm1 floor ge gt
    integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow reduce_precision
    rem round rsqrt select_n sign sqrt square stop_gradient sub tanh xor
    """.split()  # noqa: SIM905
)
_CALLS = frozenset(["jit", "pjit", "closed_call", "custom_jvp_call"])

# Number of the leaf that an array belongs to; None for a scalar, or the same number everywhere.
Owner = int | None


class _Coupled(Exception):
    """Entries meet."""


@dataclasses.dataclass(frozen=True)
class Entrywise:
    """A function in which every entry depends on the same entry of the same leaf alone.

    It is the program that was traced on whole leaves, so that what it computes from their sizes,
    places or paths stays what it was; it runs on any piece of one leaf.

    Args:
      jaxpr: The program.
      inputs: The leaf that each argument belongs to.
      outputs: The leaf that each result belongs to.
    """

    jaxpr: core.Jaxpr
    inputs: Sequence[Owner]
    outputs: Sequence[Owner]

    def run(self, leaf: int, shape: tuple[int, ...], values: Sequence[jax.Array]) -> list[Any]:
        """Results that belong to a leaf, and scalars, from such arguments.

        Args:
          leaf: Number of the leaf.
          shape: Of the piece.
          values: Pieces of the arguments that belong to the leaf, and all scalars, in order.
        """
        given = iter(values)
        mine = (leaf, None)
        arguments = [next(given) if owner in mine else None for owner in self.inputs]
        results = _evaluate(self.jaxpr, arguments)
        return [
            value if owner is None else jnp.broadcast_to(value, shape)
            for value, owner in zip(results, self.outputs, strict=True)
            if owner in mine
        ]


def entrywise(
    fn: Callable[..., Any], args: Any, inputs: Sequence[Owner], outputs: Sequence[Owner]
) -> Entrywise | None:
    """`fn` as a program for pieces; None if entries meet in it, or might.

    Scalars may enter everywhere; results that are scalars must not depend on arrays.

    Args:
      fn: A function of pytrees.
      args: Sequence of its arguments, or of their `ShapeDtypeStruct`s.
      inputs: The leaf that each array of `args` belongs to.
      outputs: The leaf that each array of the result belongs to.
    """
    closed = jax.make_jaxpr(fn)(*args)
    if closed.consts:
        return None
    try:
        found = _owners(closed.jaxpr, inputs)
    except _Coupled:
        return None
    fits = all(owner in (None, wanted) for owner, wanted in zip(found, outputs, strict=True))
    return Entrywise(closed.jaxpr, inputs, outputs) if fits else None


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


def _evaluate(jaxpr: core.Jaxpr, arguments: Sequence[Any]) -> list[Any]:
    """Runs what the arguments suffice for; None is what is not known.

    An array that is the same number everywhere is that number.
    """
    known = dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else known.get(atom)

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        body = _body(equation)
        if body is not None:
            results = _evaluate(body, operands)
        elif any(operand is None for operand in operands):
            results = [None] * len(equation.outvars)
        elif equation.primitive.name == "broadcast_in_dim":
            results = operands
        else:
            shape = jnp.broadcast_shapes(*(jnp.shape(operand) for operand in operands))
            same = [jnp.broadcast_to(operand, shape) for operand in operands]
            result = equation.primitive.bind(*same, **equation.params)
            results = result if equation.primitive.multiple_results else [result]
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


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
