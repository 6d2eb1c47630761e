"""The pure part of training: one update, one evaluation, both functions of pytrees only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import galore_jax as gj

Batch = dict[str, jax.Array]
LossFn = Callable[[Any, Batch], jax.Array]


class TrainState(NamedTuple):
    """What a step maps to what comes next; `step` counts batches, skipped ones included."""

    step: jax.Array
    params: Any
    opt_state: Any


class Metrics(NamedTuple):
    """Scalars of one step; `bad_in_a_row` counts the latest consecutive skipped updates."""

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    skipped: jax.Array
    bad_in_a_row: jax.Array


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step; weights may be stored as integer codes."""
    # Optax's own transformations would take the codes for parameters.
    opt_state = tx.init(gj.quant.dequantize_params(params))
    return TrainState(jnp.zeros([], jnp.int32), params, opt_state)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    accumulation: int = 1,
    rounding_key: jax.Array | None = None,
    state_sharding: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One jitted update; the state's buffers are reused for the new state.

    INT8 and bf16 weights are rounded stochastically with the random numbers of `rounding_key` and
    the step; to nearest without it.

    With `state_sharding` the new state is where the old one was, and so its buffers serve again.

    `tx` is an `optax.apply_if_finite`: it skips the update when a gradient is not finite. A loss
    that is not finite although its gradient is poisons the gradient, so that it is skipped too.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, grads = accumulated_value_and_grad(loss_fn, state.params, batch, accumulation)
        finite = jnp.isfinite(loss)
        grads = jax.tree.map(lambda g: jnp.where(finite, g, jnp.nan), grads)
        # A skipped update does not advance the optimizer's count, so nor does it the schedule.
        rate = schedule(state.step - state.opt_state.total_notfinite)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        key = None if rounding_key is None else jax.random.fold_in(rounding_key, state.step)
        params = gj.apply_updates(state.params, updates, key=key)
        metrics = Metrics(
            loss=loss,
            grad_norm=optax.tree.norm(grads),
            learning_rate=rate,
            skipped=opt_state.total_notfinite,
            bad_in_a_row=opt_state.notfinite_count,
        )
        return TrainState(state.step + 1, params, opt_state), metrics

    if state_sharding is None:
        return jax.jit(train_step, donate_argnums=0)
    return jax.jit(
        train_step, donate_argnums=0, out_shardings=(state_sharding, state_sharding.step)
    )


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

    # Every k-th row: where rows are spread over devices, each has its part of every micro-batch.
    split = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)
    shapes = jax.eval_shape(gj.quant.dequantize_params, params)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (jnp.zeros([]), shapes))
    (loss, grads), _ = jax.lax.scan(micro_pass, zeros, split)
    total_weight = token_weight(batch)
    grads = jax.tree.map(lambda g, p: (g / total_weight).astype(p.dtype), grads, params)
    return loss / total_weight, grads


def token_weight(batch: Batch) -> jax.Array:
    """How many tokens the batch's mean loss is a mean over."""
    if "weights" in batch:
        return jnp.sum(batch["weights"].astype(jnp.float32))
    return jnp.asarray(batch["targets"].size, jnp.float32)


def make_eval_step(loss_fn: LossFn) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """Mean loss of one batch and the number of tokens it is a mean over."""
    return jax.jit(lambda params, batch: (loss_fn(params, batch), token_weight(batch)))


def evaluate(eval_step: Callable[..., Any], params: Any, batches: Iterable[Batch]) -> float:
    """The mean loss per token over all batches; a short last batch counts by its tokens."""
    total, tokens = 0.0, 0.0
    for loss, weight in jax.device_get([eval_step(params, batch) for batch in batches]):
        total += float(loss) * float(weight)
        tokens += float(weight)
    if not tokens:
        raise ValueError("nothing to evaluate on: the validation split holds no full sequence")
    return total / tokens
