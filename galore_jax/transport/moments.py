"""Which fields of which optimizer states are moments of the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.quant import power


class _Kinds(NamedTuple):
    first: tuple[str, ...]
    second: tuple[str, ...]


_REGISTRY: dict[type, _Kinds] = {}


def register_moment(
    state_type: type, *, first: str | tuple[str, ...] = (), second: str | tuple[str, ...] = ()
) -> None:
    """Tells the transports which fields of a state are moments.

    First moments are linear in the gradient (momentum), second moments are averages of squares of
    its entries. optax's Adam, AMSGrad, Lion, trace, EMA and RMS states are known.

    Args:
      state_type: A NamedTuple class; its moment fields have the structure of the parameters.
      first: Names of the fields that hold first moments.
      second: Names of the fields that hold second moments.

    Raises:
      TypeError: `state_type` is not a NamedTuple class.
      ValueError: It has no such field.

    Example:
      >>> from typing import NamedTuple
      >>> import optax, galore_jax as gj
      >>> class MyState(NamedTuple):
      ...     momentum: optax.Updates
      >>> gj.transport.register_moment(MyState, first="momentum")
    """
    if not (isinstance(state_type, type) and hasattr(state_type, "_fields")):
        raise TypeError(f"register_moment takes a NamedTuple class, got {state_type!r}.")
    kinds = _Kinds(*((n,) if isinstance(n, str) else tuple(n) for n in (first, second)))
    for name in kinds.first + kinds.second:
        if name not in state_type._fields:
            raise ValueError(f"{state_type.__name__} has no field {name!r}: {state_type._fields}.")
    _REGISTRY[state_type] = kinds


register_moment(optax.ScaleByAdamState, first="mu", second="nu")
register_moment(optax.ScaleByAmsgradState, first="mu", second=("nu", "nu_max"))
register_moment(optax.ScaleByLionState, first="mu")
register_moment(optax.TraceState, first="trace")
register_moment(optax.EmaState, first="ema")
register_moment(optax.ScaleByRmsState, second="nu")
register_moment(optax.ScaleByRStdDevState, first="mu", second="nu")
register_moment(optax.ScaleByRssState, second="sum_of_squares")


class Moments(NamedTuple):
    """The moments that one optimizer state holds for one leaf, by field name.

    Arrays, or `quant.PowerArray`s in the state of `quantized_state`.
    """

    first: dict[str, Any]
    second: dict[str, Any]
    # Updates that went into them; None for states that do not count.
    count: jax.Array | None  # type: ignore[assignment]  # optax's name for it


def decoded(moments: Moments) -> Moments:
    """The same moments as arrays."""

    def decode(field: Any) -> Any:
        return power.decode(field) if isinstance(field, power.PowerArray) else field

    return moments._replace(
        first={name: decode(field) for name, field in moments.first.items()},
        second={name: decode(field) for name, field in moments.second.items()},
    )


def encoded_like(moments: Moments, like: Moments) -> Moments:
    """Moments that are arrays, each stored as in `like`."""

    def encode(fields: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
        return {
            name: power.encode_like(field, stored[name])
            if isinstance(stored[name], power.PowerArray)
            else field
            for name, field in fields.items()
        }

    return moments._replace(
        first=encode(moments.first, like.first), second=encode(moments.second, like.second)
    )


def encode_state_like(state: Any, stored: Any, treedef: Any) -> Any:
    """A state whose moments are arrays, each stored as in `stored`, a state of the same kind."""
    found: list[Moments] = []

    def collect(leaf: int, moments: Moments) -> Moments:
        del leaf
        found.append(moments)
        return moments

    map_moments(stored, treedef, collect)
    likes = iter(found)
    return map_moments(state, treedef, lambda _, moments: encoded_like(moments, next(likes)))


def map_moments(state: Any, treedef: Any, fn: Callable[[int, Moments], Moments]) -> Any:
    """Applies `fn` to the moments of every leaf, in every registered state inside `state`.

    Args:
      state: Any nesting of tuples, NamedTuples, lists and dicts.
      treedef: Structure of the parameters.
      fn: Maps (leaf number, its moments) to new moments.

    Returns:
      The state with its moments replaced; everything else as it was.
    """
    return _map_registered(state, lambda found: _map_leaves(found, treedef, fn))


def only_leaf(state: Any, treedef: Any, leaf: int) -> Any:
    """The state with the moments of one leaf; `optax.MaskedNode`s take the places of the others."""

    def restrict(found: Any) -> Any:
        names, fields = _fields(found, treedef)
        masked = [optax.MaskedNode()] * treedef.num_leaves
        kept = {name: [*masked[:leaf], fields[name][leaf], *masked[leaf + 1 :]] for name in names}
        return found._replace(**{name: treedef.unflatten(kept[name]) for name in names})

    return _map_registered(state, restrict)


def _map_registered(state: Any, fn: Callable[[Any], Any]) -> Any:
    """Applies `fn` to every registered state inside `state`."""
    if type(state) in _REGISTRY:
        return fn(state)
    if isinstance(state, dict):
        children = [(key, _map_registered(child, fn)) for key, child in state.items()]
        return type(state)(children)  # an OrderedDict stays one
    if isinstance(state, tuple | list):
        parts = [_map_registered(child, fn) for child in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    return state


def check_known(state: Any, treedef: Any) -> None:
    """Raises if `state` keeps arrays outside its registered moments.

    Raises:
      TypeError: There is an array, other than a scalar, whose meaning nobody registered.
    """

    def blank(leaf: int, moments: Moments) -> Moments:
        del leaf
        return jax.tree.map(lambda _: jnp.zeros(()), decoded(moments))

    unknown = [x for x in jax.tree.leaves(map_moments(state, treedef, blank)) if jnp.ndim(x) > 0]
    if unknown:
        raise TypeError(
            "the inner transformation keeps arrays whose meaning is unknown (shapes "
            f"{sorted({jnp.shape(x) for x in unknown})}), so this transport cannot carry them to a "
            "new basis. Use transport.align(), which serves any inner transformation, or tell "
            "transport.register_moment which fields are moments."
        )


def _fields(state: Any, treedef: Any) -> tuple[list[str], dict[str, list[Any]]]:
    """Names of the moment fields of a registered state, and their leaves."""
    kinds = _REGISTRY[type(state)]
    names = [*kinds.first, *kinds.second]
    try:
        return names, {name: treedef.flatten_up_to(getattr(state, name)) for name in names}
    except (ValueError, TypeError):
        raise TypeError(
            f"the moments of {type(state).__name__} do not have the structure of the parameters, "
            "so this transport cannot carry them to a new basis. Use transport.align(), which "
            "serves any inner transformation."
        ) from None


def _map_leaves(state: Any, treedef: Any, fn: Callable[[int, Moments], Moments]) -> Any:
    kinds = _REGISTRY[type(state)]
    _, fields = _fields(state, treedef)
    for leaf in range(treedef.num_leaves):
        here = {name: leaves[leaf] for name, leaves in fields.items()}
        if any(isinstance(moment, optax.MaskedNode) for moment in here.values()):
            continue  # optax.masked: this leaf has no state here
        moments = fn(
            leaf,
            Moments(
                {name: here[name] for name in kinds.first},
                {name: here[name] for name in kinds.second},
                # Not getattr: every tuple has a method of that name.
                state.count if "count" in state._fields else None,
            ),
        )
        for name, moment in {**moments.first, **moments.second}.items():
            fields[name][leaf] = moment
    return state._replace(**{name: treedef.unflatten(leaves) for name, leaves in fields.items()})
