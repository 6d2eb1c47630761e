"""Checks of plain values that users give, and whether anybody is to hear of the rest."""

from __future__ import annotations

import contextlib
import contextvars
import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Steps, sizes and counts are int32 on devices.
LARGEST = 2**31 - 1


def check_count(name: str, value: Any, *, least: int = 1) -> int:
    """The value as a Python integer.

    Args:
      name: The argument, for messages.
      value: Anything with ``__index__``: Python and NumPy integers.
      least: The smallest value that is accepted.

    Raises:
      TypeError: It is no integer.
      ValueError: It is below `least`, or beyond int32.
    """
    try:
        if isinstance(value, bool | jax.Array):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        hint = (
            " Under optax.inject_hyperparams pass static_args=galore_jax.STATIC_ARGS."
            if isinstance(value, jax.Array)
            else ""
        )
        raise TypeError(f"`{name}` must be an integer, got {value!r}.{hint}") from None
    if not least <= number <= LARGEST:
        raise ValueError(f"`{name}` must be at least {least} and below 2**31, got {number}.")
    return number


def check_number(name: str, value: Any) -> None:
    """Raises unless the value is a Python or NumPy number."""
    if isinstance(value, bool | np.bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")


def check_transformation(name: str, value: Any) -> None:
    """Raises unless the value has the two functions of a gradient transformation."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise TypeError(f"`{name}` must be a gradient transformation, got {value!r}.")


def check_bool(name: str, value: Any) -> None:
    """Raises unless the value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` is True or False, got {value!r}.")


def check_floating(name: str, dtype: Any) -> jnp.dtype:
    """The dtype, which has to be a real floating one; None would mean float64."""
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"`{name}` must be a floating dtype, got {dtype!r}.")
    return found


_QUIET = contextvars.ContextVar("quiet", default=False)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Inside, `is_quiet` holds: a tool asks for shapes, and a user sees its answer."""
    token = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(token)


def is_quiet() -> bool:
    """Whether notices about a model are to be kept back."""
    return _QUIET.get()
