"""Skipping updates from gradients that are not finite, in whatever form they arrive."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax import collectives
from galore_jax.checks import check_count, check_transformation
from galore_jax.meshes import preserve_sharding
from galore_jax.transforms.compiled import compiled_once
from galore_jax.transforms.lenses import settled, with_lost_configs
from galore_jax.transforms.projected import updates_like
from galore_jax.transforms.state import check_state, low_rank_states


class ApplyIfFiniteState(NamedTuple):
    """State of `apply_if_finite`, with the fields of `optax.ApplyIfFiniteState`.

    Args:
      notfinite_count: int32 scalar, skipped updates in a row, up to the last one.
      last_finite: Bool scalar, whether the last gradient was finite.
      total_notfinite: int32 scalar, gradients that were not.
      inner_state: State of the protected transformation.
    """

    notfinite_count: jax.Array
    last_finite: jax.Array
    total_notfinite: jax.Array
    inner_state: optax.OptState


def apply_if_finite(
    inner: optax.GradientTransformation, max_consecutive_errors: int
) -> optax.GradientTransformationExtraArgs:
    """`optax.apply_if_finite` for gradients of any form.

    Where a gradient has a NaN or an inf the update is zero and the state of `inner` stays what it
    was, unless that has happened `max_consecutive_errors` times in a row already.

    Optax's own makes its zeros from the gradients, but a `ProjectedGradient` has not the shape of
    its parameter. With lenses that have an `axis_name`, all devices skip together.

    Args:
      inner: The transformation to protect.
      max_consecutive_errors: How many updates in a row may be skipped.

    Returns:
      A gradient transformation with an `ApplyIfFiniteState`.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> params = {"w": jnp.ones((64, 32))}
      >>> tx = gj.apply_if_finite(gj.galore_adamw(1e-2, rank=4), max_consecutive_errors=5)
      >>> updates, state = tx.update({"w": jnp.full((64, 32), jnp.nan)}, tx.init(params), params)
      >>> float(jnp.max(updates["w"])), int(state.total_notfinite)
      (0.0, 1)
    """
    check_count("max_consecutive_errors", max_consecutive_errors, least=0)
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> ApplyIfFiniteState:
        return ApplyIfFiniteState(
            notfinite_count=jnp.zeros((), jnp.int32),
            last_finite=jnp.ones((), bool),
            total_notfinite=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: ApplyIfFiniteState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ApplyIfFiniteState]:
        check_state("apply_if_finite", state, ApplyIfFiniteState)
        before = with_lost_configs(state.inner_state, inner, updates, params)
        finite = _all_finite(updates, before)
        count = jnp.where(finite, 0, optax.safe_increment(state.notfinite_count.astype(jnp.int32)))

        def apply() -> tuple[optax.Updates, optax.OptState]:
            return inner.update(updates, before, params, **extra_args)

        def skip() -> tuple[optax.Updates, optax.OptState]:
            new_updates, after = jax.eval_shape(apply)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), new_updates)
            return zeros, settled(before, after)

        total = state.total_notfinite.astype(jnp.int32)
        given_up = count > max_consecutive_errors
        new_updates, inner_state = jax.lax.cond(finite | given_up, apply, skip)
        return new_updates, ApplyIfFiniteState(
            notfinite_count=count,
            last_finite=finite,
            total_notfinite=jnp.where(finite, total, optax.safe_increment(total)),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(
        init_fn, preserve_sharding(compiled_once(update_fn), updates_like)
    )


def _all_finite(updates: optax.Updates, state: optax.OptState) -> jax.Array:
    """True if every entry is finite, on all devices that share gradients."""
    flags = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(updates)]
    finite = jnp.all(jnp.stack(flags)) if flags else jnp.ones((), bool)
    for axis_name in {lens.config.axis_name for lens in low_rank_states(state)} - {None}:
        finite = collectives.largest((~finite).astype(jnp.float32), axis_name) == 0
    return finite
