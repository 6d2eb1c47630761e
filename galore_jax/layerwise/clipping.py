"""Clipping by global norm, when no gradient is there as a whole."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.leaves import Leaves
from galore_jax.views import ProjectedGradient


class PreviousNormState(NamedTuple):
    """State of `clip_by_previous_norm`.

    Args:
      norm: fp32 scalar, the global norm of the latest finite gradient; zero before the first step.
    """

    norm: jax.Array

    @property
    def scales_gradients(self) -> bool:
        """Whether projected gradients are still those when they arrive at a lens behind it."""
        return True


def clip_by_previous_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    r"""Clips by the global norm that the gradient had one step ago.

    .. math::
      G_t \leftarrow G_t \min(1, c / \lVert G_{t-1} \rVert)

    `optax.clip_by_global_norm` needs all gradients before the first update; this
    needs none, so it works under `layerwise.train_step`, at no cost. A step whose norm
    jumps is not clipped itself, but the next one is. The first step is not clipped.

    Put it first in the chain. Ordinary steps can use it as well, on one device and without a window
    with the same result, and so go on from each other's states. Under `layerwise.train_step` it is
    told the norm of the latest call: inside a window of `accumulate` that of the last micro-batch,
    under mapped axes the root of the mean of the squares on each device. An ordinary step takes the
    norm of the mean, which is smaller as a rule. In front of `accumulate` it clips every call.

    Args:
      max_norm: c, the norm above which gradients are scaled down.

    Returns:
      A gradient transformation with a `PreviousNormState`. It takes the extra argument `grad_norm`,
      the norm to keep for the next step, and computes it from the updates without one.

    Raises:
      ValueError: `max_norm` is not positive.

    Example:
      >>> import optax, galore_jax as gj
      >>> from galore_jax import layerwise
      >>> tx = optax.chain(layerwise.clip_by_previous_norm(1.0), gj.galore_adamw(1e-2))
    """
    check_max_norm("max_norm", max_norm)

    def init_fn(params: optax.Params) -> PreviousNormState:
        del params
        return PreviousNormState(jnp.zeros((), jnp.float32))

    def update_fn(
        updates: optax.Updates,
        state: PreviousNormState,
        params: optax.Params | None = None,
        *,
        grad_norm: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PreviousNormState]:
        del params, extra_args
        norm = jnp.sqrt(square_sum(updates)) if grad_norm is None else grad_norm
        norm = norm.astype(jnp.float32)
        clipped = scaled(updates, clip_factor(state.norm, max_norm))
        return clipped, PreviousNormState(jnp.where(jnp.isfinite(norm), norm, state.norm))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def clip_factor(norm: jax.Array, max_norm: float) -> jax.Array:
    """Factor on a gradient of this norm."""
    limit = jnp.asarray(max_norm, norm.dtype)
    return jnp.where(norm > limit, limit / norm, jnp.ones_like(norm))


def scaled(gradients: Any, factor: jax.Array) -> Any:
    """Gradients times a scalar, each in its dtype."""
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)


def square_sum(gradients: Any) -> jax.Array:
    """The square of their global norm; of projected gradients, that of the values."""
    dtype = norm_dtype(gradients)
    squares = [_square_sum(value.astype(dtype)) for value in values_of(gradients)]
    return sum(squares, start=jnp.zeros((), dtype))


def values_of(gradients: Any) -> list[jax.Array]:
    """The arrays that a norm is taken of."""
    return [
        leaf.value if isinstance(leaf, ProjectedGradient) else leaf
        for leaf in Leaves.of(gradients).values
        if not isinstance(leaf, optax.MaskedNode)
    ]


def _square_sum(x: jax.Array) -> jax.Array:
    # XLA makes a dot product of a sum of squares, which gave garbage on the CPU for projected
    # gradients that nothing else reads (JAX 0.10.2). It does not look through this.
    info = jnp.finfo(x.dtype)
    return jnp.sum(jax.lax.reduce_precision(jnp.square(x), info.nexp, info.nmant))


def squares_of(gradients: Any, numbers: Collection[int]) -> dict[int, jax.Array]:
    """The squares of the norms of some of the leaves, by their numbers."""
    leaves = Leaves.of(gradients).values
    return {number: square_sum(leaves[number]) for number in numbers}


def norm_dtype(tree: Any) -> Any:
    """The dtype to take a norm in: fp32, or wider if an array is."""
    dtypes = (getattr(leaf, "dtype", jnp.float32) for leaf in Leaves.of(tree).values)
    return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


def check_max_norm(name: str, max_norm: Any) -> None:
    """Raises unless it is a positive number."""
    if isinstance(max_norm, bool) or not isinstance(max_norm, int | float) or not max_norm > 0:
        raise ValueError(f"`{name}` must be a positive number, got {max_norm!r}.")
