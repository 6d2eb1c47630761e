"""What the inner transformation gets to see."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.transforms.config import LowRankConfig
from galore_jax.views import LeafPlan
from galore_jax.views.leaves import is_one_leaf


def inner_proxy(config: LowRankConfig, plan: LeafPlan, leaf: Any) -> Any:
    """What the inner transformation is initialised on."""
    if plan.view is not None:
        return jnp.zeros(plan.view.low_rank_shape(plan.rank), config.state_dtype)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        leaf = jnp.zeros(leaf.shape, leaf.dtype)
    return at_full_size(config, plan, leaf)


def at_full_size(config: LowRankConfig, plan: LeafPlan, leaf: Any) -> Any:
    """A leaf that is not projected, in the state dtype."""
    if not plan.is_inexact:
        return optax.MaskedNode()  # integers are nothing an optimizer can average
    if jnp.issubdtype(plan.dtype, jnp.complexfloating):
        return leaf
    return (leaf if is_one_leaf(leaf) else jnp.asarray(leaf)).astype(config.state_dtype)


def check_inner(inner: optax.GradientTransformationExtraArgs, state: Any, proxies: Any) -> None:
    """Raises if `inner` needs parameters, which do not exist in the subspace."""

    def fails(params: Any) -> Exception | None:
        try:
            jax.eval_shape(lambda *args: inner.update(*args), proxies, state, params)
        except Exception as error:
            return error
        return None

    error = fails(None)
    # Failing with parameters too means that it misses something else (extra arguments, say).
    if error is not None and fails(proxies) is None:
        raise ValueError(
            "the inner transformation needs `params`, which live in the full space, not in the "
            "subspace. Put it behind the lens, e.g. optax.chain(low_rank_projection("
            "optax.scale_by_adam(), rank), optax.add_decayed_weights(1e-2)) instead of an AdamW "
            "inside."
        ) from error
