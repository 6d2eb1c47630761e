"""Layer by layer, and a batch in several micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_jax as gj
from examples.llama.gradients import Batch, split, token_weight


def layerwise_update(
    pieces: Sequence[Callable[..., Any]],
    tx: optax.GradientTransformationExtraArgs,
    micro_batches: int,
    **options: Any,
) -> Callable[..., tuple[Any, Any, gj.layerwise.Metrics]]:
    """``(params, opt_state, batch, key) -> (params, opt_state, metrics)``, for a state of `tx`.

    Micro-batches walk through the layers one after the other, and each layer sums up its projected
    gradients; the last one updates it. As in the other ways to take gradients, the window of
    `gj.accumulate` lives inside the step. A clip is of each micro-batch by itself.

    Args:
        pieces: the model in three functions.
        tx: the optimizer.
        micro_batches: into how many parts a batch is cut.
        **options: of `galore_jax.layerwise.train_step`.
    """
    if micro_batches == 1:
        return gj.layerwise.train_step(*pieces, tx, **options)
    embed, block, head = pieces
    window_tx = gj.accumulate(tx, micro_batches)

    def share(params: Any, x: jax.Array, batch: Batch) -> jax.Array:
        return head(params, x, batch) * batch["share"]

    walk = gj.layerwise.train_step(embed, block, share, window_tx, **options)

    def update(
        params: Any, opt_state: Any, batch: Batch, key: jax.Array | None = None
    ) -> tuple[Any, Any, gj.layerwise.Metrics]:
        def micro_pass(carry: tuple[Any, Any], micro_batch: Batch) -> tuple[Any, Any]:
            *carry, made = walk(*carry, micro_batch, key)
            return tuple(carry), made

        parts = split(batch, micro_batches)
        # Their mean is the mean over the tokens of the whole batch.
        weights = jax.vmap(token_weight)(parts) * micro_batches / token_weight(batch)
        window = window_tx.init(gj.quant.dequantize_params(params))._replace(opt_state=opt_state)
        (params, window), made = jax.lax.scan(
            micro_pass, (params, window), {**parts, "share": weights}
        )
        metrics = made._replace(
            loss=jnp.mean(made.loss),
            grad_norm=optax.tree.norm(window.sums) / micro_batches,
            skipped=jnp.sum(made.skipped),
        )
        return params, window.opt_state, metrics

    return update
