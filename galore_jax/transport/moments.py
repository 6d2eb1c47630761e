"""A registry of the fields of optimizer states that are moments of the gradient."""

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
    elementwise: bool

    @property
    def names(self) -> tuple[str, ...]:
        return self.first + self.second


_REGISTRY: dict[type, _Kinds] = {}


def register_moment(
    state_type: type,
    *,
    first: str | tuple[str, ...] = (),
    second: str | tuple[str, ...] = (),
    elementwise: bool = False,
) -> None:
    """Declares which fields of a state are moments.

    First moments are linear in the gradient (momentum), second moments are averages of squares of
    its entries. optax's Adam, AMSGrad, Lion, trace, EMA, RMS and RSS states are known, and all of
    these are elementwise.

    A declaration is about every transformation whose state is of this type. A transformation that
    calls Adam's `update` and also, say, divides by a norm must not return Adam's state as its own:
    give it a state type of its own. A second declaration replaces the first.

    Args:
      state_type: A NamedTuple class; its moment fields have the structure of the parameters.
      first: Names of the fields that hold first moments.
      second: Names of the fields that hold second moments.
      elementwise: Whether each entry of the update and of the new moments depends only on the same
        entry of the gradient, the moments and the parameters, and on scalars; never on the shape
        or the path of its leaf. `quantized_state` then updates large stacks in pieces.

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
    first, second = ((n,) if isinstance(n, str) else tuple(n) for n in (first, second))
    for name in first + second:
        if name not in state_type._fields:
            raise ValueError(f"{state_type.__name__} has no field {name!r}: {state_type._fields}.")
    _REGISTRY[state_type] = _Kinds(first, second, elementwise)


register_moment(optax.ScaleByAdamState, first="mu", second="nu", elementwise=True)
register_moment(optax.ScaleByAmsgradState, first="mu", second=("nu", "nu_max"), elementwise=True)
register_moment(optax.ScaleByLionState, first="mu", elementwise=True)
register_moment(optax.TraceState, first="trace", elementwise=True)
register_moment(optax.EmaState, first="ema", elementwise=True)
register_moment(optax.ScaleByRmsState, second="nu", elementwise=True)
register_moment(optax.ScaleByRStdDevState, first="mu", second="nu", elementwise=True)
register_moment(optax.ScaleByRssState, second="sum_of_squares", elementwise=True)


class Moments(NamedTuple):
    """The moments that one optimizer state holds for one leaf, by field name.

    Arrays, or `quant.PowerArray`s in the state of `quantized_state`.
    """

    first: dict[str, Any]
    second: dict[str, Any]
    # Updates that went into them; None for states that do not count.
    count: jax.Array | None  # type: ignore[assignment]  # optax's name for it


def decoded(moments: Any) -> Any:
    """The same moments, or a whole state with them, as arrays."""
    return jax.tree.map(
        lambda x: power.decode(x) if _is_codes(x) else x, moments, is_leaf=_is_codes
    )


def encoded_like(moments: Any, like: Any) -> Any:
    """Moments that are arrays, or a whole state with them, each stored as in `like`."""
    return jax.tree.map(
        lambda old, x: power.encode_like(x, old) if _is_codes(old) else x,
        like,
        moments,
        is_leaf=_is_codes,
    )


def map_moments(state: Any, treedef: Any, fn: Callable[[int, Moments], Moments]) -> Any:
    """Applies `fn` to the moments of every leaf, in every registered state inside `state`.

    Args:
      state: Any optimizer state.
      treedef: Structure of the parameters.
      fn: Maps (leaf number, its moments) to new moments.

    Raises:
      TypeError: Moments do not have the structure of the parameters.
    """
    if not treedef.num_leaves:
        return state

    def map_state(state: Any, kinds: _Kinds) -> Any:
        try:
            columns = [treedef.flatten_up_to(getattr(state, name)) for name in kinds.names]
        except (ValueError, TypeError):
            raise TypeError(
                f"the moments of {type(state).__name__} do not have the structure of the "
                "parameters, so this transport cannot carry them to a new basis. Use "
                "transport.align(), which serves any inner transformation."
            ) from None
        # Not getattr: every tuple has a method of that name.
        count = state.count if "count" in state._fields else None
        for leaf, here in enumerate(zip(*columns, strict=True)):
            if any(isinstance(moment, optax.MaskedNode) for moment in here):
                continue  # optax.masked: this leaf has no state here
            old = dict(zip(kinds.names, here, strict=True))
            first, second = ({name: old[name] for name in names} for names in kinds[:2])
            moments = fn(leaf, Moments(first, second, count))
            new = moments.first | moments.second
            for name, column in zip(kinds.names, columns, strict=True):
                column[leaf] = new[name]
        return state._replace(
            **dict(zip(kinds.names, map(treedef.unflatten, columns), strict=True))
        )

    return _map_registered(state, map_state)


def registered_states(state: Any) -> list[Any]:
    """All registered states inside `state`."""
    return list(filter(_is_registered, jax.tree.leaves(state, is_leaf=_is_registered)))


def without_moments(state: Any) -> Any:
    """The state with a scalar in the place of every field that holds moments."""
    return _map_registered(
        state, lambda state, kinds: state._replace(**dict.fromkeys(kinds.names, jnp.zeros(())))
    )


def elementwise_fields(state: Any) -> tuple[str, ...]:
    """Names of the moment fields of a state that was declared elementwise; none of any other.

    The state of a chain never is: whatever else is in the chain may couple entries and keep no
    state, as a clip by global norm does.
    """
    kinds = _REGISTRY.get(type(state))
    if kinds is None or not kinds.elementwise or _other_arrays(state):
        return ()
    return kinds.names


def check_known(state: Any, treedef: Any) -> None:
    """Raises if `state` keeps arrays, other than scalars, outside its registered moments."""
    map_moments(state, treedef, lambda leaf, moments: moments)
    unknown = _other_arrays(state)
    if unknown:
        raise TypeError(
            "the inner transformation keeps arrays whose meaning is unknown (shapes "
            f"{sorted({jnp.shape(x) for x in unknown})}), so this transport cannot carry them to a "
            "new basis. Use transport.align(), which serves any inner transformation, or tell "
            "transport.register_moment which fields are moments."
        )


def _other_arrays(state: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(without_moments(state)) if jnp.ndim(x)]


def _map_registered(state: Any, fn: Callable[[Any, _Kinds], Any]) -> Any:
    """Applies `fn` to every registered state inside `state`, with what is declared about it."""
    return jax.tree.map(
        lambda node: fn(node, _REGISTRY[type(node)]) if _is_registered(node) else node,
        state,
        is_leaf=_is_registered,
    )


def _is_registered(node: Any) -> bool:
    return type(node) in _REGISTRY


def _is_codes(node: Any) -> bool:
    return isinstance(node, power.PowerArray)
