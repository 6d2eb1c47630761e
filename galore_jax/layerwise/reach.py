"""What every result of a traced program depends on, layer by layer.

An abstract interpretation: instead of numbers, every array carries the names of the arguments it is
made from, and the axis, if there is one, along which entry i is made from layer i alone. Nothing
is computed. What is not understood counts as a mixture of all layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from galore_jax.layerwise.axis_rules import AXIS_RULES

# Names for what a slice of one layer would make differently, without any argument.
RANDOM = "random numbers"
POSITION = "position"

# Axis of a value inside a loop over the layers: it belongs to one of them as a whole.
_EACH = -1
_CALLS = frozenset(
    """
    checkpoint closed_call core_call custom_jvp_call custom_vjp_call jit pjit remat remat2
    """.split()  # noqa: SIM905
)
_RANDOM = frozenset(
    """
    random_bits random_gamma random_seed rng_bit_generator rng_uniform threefry2x32
    """.split()  # noqa: SIM905
)
_ZERO_IF_ALL_ARE = frozenset(
    """
    add broadcast_in_dim concatenate convert_element_type copy max mesh_cast ne or pvary reduce_max
    reduce_or reduce_sum reshape reshard sharding_constraint slice squeeze stack transpose
    """.split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True)
class Reach:
    """What an array depends on.

    Args:
      layers: Names of the stacked arguments among it.
      axis: Where entry i depends on layer i of these alone; None: it depends on all layers.
      start: For a window of the layers, what stands for the number of the first one; None: all.
      outside: Names of the other arguments among it.
      zero: Whether it is known to be zero.
      symbol: What stands for its value, if it is an integer scalar.
    """

    layers: frozenset[str] = frozenset()
    axis: int | None = None
    start: Hashable = None
    outside: frozenset[str] = frozenset()
    zero: bool = False
    symbol: Hashable = None


def reach(jaxpr: core.Jaxpr, inputs: Sequence[Reach], layers: int) -> list[Reach]:
    """The reach of every result of a program.

    Args:
      jaxpr: The program; its constants depend on nothing.
      inputs: The reach of every argument.
      layers: Number of layers.
    """
    known: dict[Any, Reach] = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(atom: Any) -> Reach:
        if isinstance(atom, core.Literal):
            value = np.asarray(atom.val)
            return Reach(zero=not np.any(value != 0), symbol=("literal", str(value)))
        return known.get(atom, Reach(symbol=id(atom)))

    for eqn in jaxpr.eqns:
        operands = [of(atom) for atom in eqn.invars]
        known.update(zip(eqn.outvars, _results(eqn, operands, layers), strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _results(eqn: Any, operands: list[Reach], layers: int) -> list[Reach]:
    name = eqn.primitive.name
    if name in _CALLS:
        return reach(_body(eqn), operands, layers)
    if name == "cond":
        return _cond(eqn, operands, layers)
    if name == "while":
        return _while(eqn, operands, layers)
    if name == "scan":
        return _scan(eqn, operands, layers)
    if name == "optimization_barrier":
        return operands
    if name == "select_n" and operands[0].zero:
        return [operands[1]]
    if name == "and" and any(operand.zero for operand in operands):
        return [Reach(zero=True)]
    result = _combined(eqn, operands, layers)
    if _is_zero(name, operands):
        return [dataclasses.replace(result, zero=True)]
    if name in _RANDOM:
        result = dataclasses.replace(result, outside=result.outside | {RANDOM})
    if name == "iota" and 1 < layers == eqn.params["shape"][eqn.params["dimension"]]:
        result = dataclasses.replace(result, outside=result.outside | {POSITION})
    return [_with_symbol(result, eqn, var, operands) for var in eqn.outvars]


def _is_zero(name: str, operands: list[Reach]) -> bool:
    if name == "mul":
        return any(operand.zero for operand in operands)  # of what is finite
    return name in _ZERO_IF_ALL_ARE and all(operand.zero for operand in operands)


def _combined(eqn: Any, operands: list[Reach], layers: int) -> Reach:
    """An ordinary primitive."""
    name = eqn.primitive.name
    places: set[tuple[int | None, Hashable]] = set()
    for number, operand in enumerate(operands):
        if not operand.layers:
            continue
        if name == "dynamic_update_slice":
            places.add(_pasted(eqn, number, operands))
        elif operand.axis is None or operand.axis == _EACH:
            places.add((operand.axis, operand.start))
        elif name == "dynamic_slice":
            places.add(_window(eqn, number, operands))
        elif name == "squeeze" and operand.start and operand.axis in eqn.params["dimensions"]:
            places.add((_EACH, operand.start))
        elif name in AXIS_RULES:
            shape = eqn.invars[number].aval.shape
            length = layers if operand.start is None else shape[operand.axis]
            axis = AXIS_RULES[name](eqn, number, operand.axis, length)
            places.add((axis, operand.start))
        else:
            places.add((None, None))
    axis, start = next(iter(places)) if len(places) == 1 else (None, None)
    return Reach(
        layers=_union(operand.layers for operand in operands),
        axis=axis,
        start=None if axis is None else start,
        outside=_union(operand.outside for operand in operands),
    )


def _window(eqn: Any, number: int, operands: list[Reach]) -> tuple[int | None, Hashable]:
    """Place of a slice of some layers."""
    whole, *starts = operands
    if number > 0 or whole.axis is None:
        return None, None
    if eqn.params["slice_sizes"][whole.axis] == eqn.invars[0].aval.shape[whole.axis]:
        return whole.axis, whole.start
    symbol = starts[whole.axis].symbol
    return (whole.axis, symbol) if whole.start is None and symbol is not None else (None, None)


def _pasted(eqn: Any, number: int, operands: list[Reach]) -> tuple[int | None, Hashable]:
    """Place of an array of which some layers are replaced: by those of the same place."""
    whole, part, *starts = operands
    axis = whole.axis if whole.layers else part.axis
    if number > 1 or axis is None or axis == _EACH:
        return None, None
    length, replaced = (var.aval.shape[axis] for var in eqn.invars[:2])
    if length == replaced:
        return operands[number].axis, operands[number].start
    if number == 0:
        return axis, whole.start
    fits = part.axis == axis or (part.axis == _EACH and replaced == 1)
    same = part.start is not None and part.start == starts[axis].symbol
    return (axis, None) if fits and same else (None, None)


def _cond(eqn: Any, operands: list[Reach], layers: int) -> list[Reach]:
    which, *arguments = operands
    branches = eqn.params["branches"]
    if which.zero:
        return reach(branches[0].jaxpr, arguments, layers)
    results = [reach(branch.jaxpr, arguments, layers) for branch in branches]
    return [_decided_by(which, _joined(parts)) for parts in zip(*results, strict=True)]


def _while(eqn: Any, operands: list[Reach], layers: int) -> list[Reach]:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_cond, of_body = operands[:first], operands[first : first + second]
    body = eqn.params["body_jaxpr"].jaxpr

    def once(carry: list[Reach]) -> list[Reach]:
        return reach(body, of_body + carry, layers)

    carry = _stable(once, operands[first + second :], eqn)
    (goes_on,) = reach(eqn.params["cond_jaxpr"].jaxpr, of_cond + carry, layers)
    return [_decided_by(goes_on, x) for x in carry]


def _scan(eqn: Any, operands: list[Reach], layers: int) -> list[Reach]:
    consts, carry, xs = _scan_groups(eqn, operands)
    carried = len(carry)
    body = eqn.params["jaxpr"].jaxpr
    tag = ("scan", id(eqn))

    def entered(x: Reach) -> Reach:
        if x.axis is None or x.axis == _EACH:
            return dataclasses.replace(x, symbol=None)
        inside = dataclasses.replace(x, axis=x.axis - 1, symbol=None)
        if inside.axis != _EACH:
            return inside
        return dataclasses.replace(inside, start=tag, axis=None if x.start else _EACH)

    def left(y: Reach) -> Reach:
        if y.axis is None or (y.axis == _EACH and y.start != tag):
            return dataclasses.replace(y, symbol=None)
        start = None if y.axis == _EACH else y.start
        return dataclasses.replace(y, axis=y.axis + 1, start=start, symbol=None)

    def once(carry: list[Reach]) -> list[Reach]:
        out = reach(body, consts + carry + list(map(entered, xs)), layers)[:carried]
        return [x if x.start != tag else _mixed(x) for x in out]

    carry = _stable(once, carry, eqn)
    ys = reach(body, consts + carry + list(map(entered, xs)), layers)[carried:]
    return carry + list(map(left, ys))


def _scan_groups(eqn: Any, operands: list[Reach]) -> list[list[Reach]]:
    """Constants, what is carried, and what is scanned over."""
    if "ft_in" in eqn.params:  # since JAX 0.12
        return [list(group) for group in eqn.params["ft_in"].update(operands).unpack()]
    first = eqn.params["num_consts"]
    second = first + eqn.params["num_carry"]
    return [operands[:first], operands[first:second], operands[second:]]


def _stable(once: Any, carry: list[Reach], eqn: Any) -> list[Reach]:
    """What a loop carries, whatever the number of its iterations."""
    while True:
        named = [
            dataclasses.replace(x, symbol=("carried", id(eqn), number), zero=False)
            for number, x in enumerate(carry)
        ]
        new = [_joined(pair) for pair in zip(named, once(named), strict=True)]
        if [_bare(x) for x in new] == [_bare(x) for x in named]:
            return named
        carry = new


def _joined(parts: Sequence[Reach]) -> Reach:
    """Any of several values."""
    places = {(x.axis, x.start) for x in parts if x.layers}
    axis, start = next(iter(places)) if len(places) == 1 else (None, None)
    return Reach(
        layers=_union(x.layers for x in parts),
        axis=axis,
        start=start,
        outside=_union(x.outside for x in parts),
        zero=all(x.zero for x in parts),
    )


def _decided_by(which: Reach, value: Reach) -> Reach:
    """A value that was chosen by a scalar."""
    value = dataclasses.replace(value, outside=value.outside | which.outside, zero=False)
    if not which.layers:
        return value
    value = dataclasses.replace(value, layers=value.layers | which.layers)
    same = which.axis == _EACH and (value.axis, value.start) in [(None, None), (_EACH, which.start)]
    return dataclasses.replace(value, axis=_EACH, start=which.start) if same else _mixed(value)


def _mixed(x: Reach) -> Reach:
    return dataclasses.replace(x, axis=None, start=None)


def _bare(x: Reach) -> Reach:
    return dataclasses.replace(x, symbol=None)


def _with_symbol(result: Reach, eqn: Any, var: Any, operands: list[Reach]) -> Reach:
    """Equal scalars, which JAX computes anew for every slice, under one name."""
    symbols = tuple(operand.symbol for operand in operands)
    if None in symbols or var.aval.shape != () or not _is_index(var.aval.dtype):
        return result
    if eqn.primitive.name == "convert_element_type":
        return dataclasses.replace(result, symbol=symbols[0])
    return dataclasses.replace(result, symbol=(eqn.primitive.name, str(eqn.params), symbols))


def _is_index(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_


def _body(eqn: Any) -> core.Jaxpr:
    body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return body.jaxpr if isinstance(body, core.ClosedJaxpr) else body


def _union(sets: Any) -> frozenset[str]:
    return frozenset().union(*sets)
