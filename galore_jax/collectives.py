"""Means over mapped axes, for gradients that every device has a share of."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...] | None


def names(axis_name: AxisName) -> tuple[str, ...]:
    """The axes as a tuple."""
    return (axis_name,) if isinstance(axis_name, str) else axis_name or ()


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


def varying(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """`x` as something that is different on every device, for whoever keeps track of that."""
    missing = tuple(name for name in names(axis_name) if name not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def varying_axes(tree: Any, like: Any) -> tuple[str, ...]:
    """Mapped axes over which arrays of `tree` are known to vary, and those of `like` are not.

    `jax.shard_map` keeps track of that, unless it is told not to; `jax.pmap` does not.
    """

    def of(tree: Any) -> frozenset[str]:
        found = (jax.typeof(x).mat.varying for x in jax.tree.leaves(tree))
        return frozenset().union(*found)

    return tuple(sorted(of(tree) - of(like)))


def psum_unvarying(x: jax.Array, like: jax.Array) -> jax.Array:
    """The sum over the axes over which `x` is known to vary and `like` is not: its cotangent."""
    axes = varying_axes(x, like)
    return jax.lax.psum(x, axes) if axes else x


def pmean_unvarying(x: jax.Array, like: jax.Array, axis_name: AxisName) -> jax.Array:
    """The mean over those of the axes over which `x` is known to vary and `like` is not.

    Where nobody keeps track, `x` stays local.
    """
    varying = varying_axes(x, like)
    return mean(x, tuple(name for name in names(axis_name) if name in varying) or None)


def check_axis_name(axis_name: AxisName) -> AxisName:
    """The axes as they are kept; raises unless they are names."""
    if axis_name is None or isinstance(axis_name, str):
        return axis_name
    if isinstance(axis_name, list | tuple) and all(isinstance(name, str) for name in axis_name):
        return tuple(axis_name) or None
    raise TypeError(
        f"`axis_name` is the name of a mapped axis (of jax.shard_map or jax.pmap) or a tuple of "
        f"names, got {axis_name!r}."
    )
