"""Means over mapped axes, for gradients that every device has a share of."""

from __future__ import annotations

import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...] | None


def mean(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """The mean over devices; `x` itself without an axis."""
    return x if axis_name is None else jax.lax.pmean(x, axis_name)


def largest(magnitude: jax.Array, axis_name: AxisName) -> jax.Array:
    """The largest of non-negative numbers over devices; inf if one of them is not finite.

    A NaN is made inf first: not every maximum over devices keeps it, and all of them have to come
    to the same answer.
    """
    if axis_name is None:
        return magnitude
    return jax.lax.pmax(jnp.where(jnp.isfinite(magnitude), magnitude, jnp.inf), axis_name)


def check_axis_name(axis_name: AxisName) -> AxisName:
    """The axes as they are kept.

    Raises:
      TypeError: They are no names.
    """
    if axis_name is None or isinstance(axis_name, str):
        return axis_name
    if isinstance(axis_name, list | tuple) and all(isinstance(name, str) for name in axis_name):
        return tuple(axis_name) or None
    raise TypeError(
        f"`axis_name` is the name of a mapped axis (of jax.shard_map or jax.pmap) or a tuple of "
        f"names, got {axis_name!r}."
    )
