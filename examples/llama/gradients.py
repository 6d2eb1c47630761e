"""Three ways from a batch to an update, all with the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import galore_jax as gj

Batch = dict[str, jax.Array]
LossFn = Callable[[Any, Batch], jax.Array]


class Update(NamedTuple):
    """What a batch does to the parameters and to the optimizer.

    Args:
        loss: of the batch.
        grad_norm: global norm of what the optimizer got: of projected gradients, where they arrive
            projected.
        updates: to be applied.
        opt_state: the optimizer's new state.
        grads: the gradients, where they were formed in full; else None.
    """

    loss: jax.Array
    grad_norm: jax.Array
    updates: Any
    opt_state: Any
    grads: Any = None


# (params, opt_state, batch) -> Update
MakeUpdate = Callable[[Any, Any, Batch], Update]


def update_maker(
    loss_fn: LossFn,
    tx: optax.GradientTransformationExtraArgs,
    *,
    projected: bool,
    micro_batches: int,
) -> MakeUpdate:
    """The one of the three that a run wants."""
    if not projected:
        return from_full_gradients(loss_fn, tx, micro_batches)
    if micro_batches == 1:
        return from_projected_gradients(loss_fn, tx)
    return from_projected_micro_batches(loss_fn, tx, micro_batches)


def from_full_gradients(
    loss_fn: LossFn, tx: optax.GradientTransformationExtraArgs, micro_batches: int
) -> MakeUpdate:
    """Gradients are formed, and averaged over micro-batches, before the optimizer sees them."""

    def update(params: Any, opt_state: Any, batch: Batch) -> Update:
        loss, grads = accumulated_value_and_grad(loss_fn, params, batch, micro_batches)
        grads = _poisoned(grads, loss)
        updates, opt_state = tx.update(grads, opt_state, params)
        return Update(loss, optax.tree.norm(grads), updates, opt_state, grads)

    return update


def from_projected_gradients(
    loss_fn: LossFn, tx: optax.GradientTransformationExtraArgs
) -> MakeUpdate:
    """The backward pass itself projects: no gradient of a projected matrix is ever formed."""
    value_and_grad = gj.projected_value_and_grad(loss_fn, tx)

    def update(params: Any, opt_state: Any, batch: Batch) -> Update:
        loss, grads = value_and_grad(params, opt_state, batch)
        grads = _poisoned(grads, loss)
        updates, opt_state = tx.update(grads, opt_state, params)
        return Update(loss, optax.tree.norm(grads), updates, opt_state)

    return update


def from_projected_micro_batches(
    loss_fn: LossFn, tx: optax.GradientTransformationExtraArgs, micro_batches: int
) -> MakeUpdate:
    """The same for micro-batches, whose projected gradients are summed up in one basis.

    The window of `gj.accumulate` lives inside the step, so that the number of micro-batches is no
    part of the state and of a checkpoint.
    """
    window_tx = gj.accumulate(tx, micro_batches)

    def update(params: Any, opt_state: Any, batch: Batch) -> Update:
        total = token_weight(batch)

        def share(params: Any, micro_batch: Batch) -> jax.Array:
            # Their mean is the mean over the tokens of the whole batch.
            weight = token_weight(micro_batch) * micro_batches / total
            return loss_fn(params, micro_batch) * weight

        value_and_grad = gj.projected_value_and_grad(share, window_tx)

        def micro_pass(carry: tuple[Any, Any], micro_batch: Batch) -> tuple[Any, jax.Array]:
            window, _ = carry
            loss, grads = value_and_grad(params, window, micro_batch)
            updates, window = window_tx.update(_poisoned(grads, loss), window, params)
            return (window, updates), loss

        decoded = gj.quant.dequantize_params(params)
        window = window_tx.init(decoded)._replace(opt_state=opt_state)
        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: decoded))
        (window, updates), losses = jax.lax.scan(
            micro_pass, (window, nothing), split(batch, micro_batches)
        )
        norm = optax.tree.norm(window.sums) / micro_batches
        return Update(jnp.mean(losses), norm, updates, window.opt_state)

    return update


def accumulated_value_and_grad(
    loss_fn: LossFn, params: Any, batch: Batch, micro_batches: int
) -> tuple[jax.Array, Any]:
    """The loss and gradient of the whole batch, from `micro_batches` smaller passes.

    `loss_fn` is a mean over weighted tokens, so the passes are averaged by their weight: a
    micro-batch with more padding counts for less, exactly as it does inside one large batch.
    """
    if micro_batches == 1:
        return gj.quant.value_and_grad(loss_fn)(params, batch)

    def micro_pass(totals: Any, micro_batch: Batch) -> tuple[Any, None]:
        weight = token_weight(micro_batch)
        loss_and_grads = gj.quant.value_and_grad(loss_fn)(params, micro_batch)
        totals = jax.tree.map(
            lambda total, x: total + weight * x.astype(jnp.float32),
            totals,
            loss_and_grads,
        )
        return totals, None

    shapes = jax.eval_shape(gj.quant.dequantize_params, params)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (jnp.zeros([]), shapes))
    (loss, grads), _ = jax.lax.scan(micro_pass, zeros, split(batch, micro_batches))
    total_weight = token_weight(batch)
    grads = jax.tree.map(lambda g, p: (g / total_weight).astype(p.dtype), grads, params)
    return loss / total_weight, grads


def split(batch: Batch, micro_batches: int) -> Batch:
    """Micro-batches on a new leading axis.

    Each takes every k-th row: where rows are spread over devices, each has its part of all of them.
    """
    return jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)


def token_weight(batch: Batch) -> jax.Array:
    """How many tokens the batch's mean loss is a mean over."""
    if "weights" in batch:
        return jnp.sum(batch["weights"].astype(jnp.float32))
    return jnp.asarray(batch["targets"].size, jnp.float32)


def _poisoned(grads: Any, loss: jax.Array) -> Any:
    """Gradients that are not finite if the loss is not, so that the update is skipped."""
    finite = jnp.isfinite(loss)
    return jax.tree.map(lambda g: jnp.where(finite, g, jnp.nan), grads)
