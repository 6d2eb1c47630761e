"""The pure part of training: one update, one evaluation, both functions of pytrees only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import galore_jax as gj
from examples.llama.gradients import Batch, LossFn, MakeUpdate, Update, token_weight
from examples.llama.windows import layerwise_update


class TrainState(NamedTuple):
    """What a step maps to what comes next; `step` counts batches, skipped ones included."""

    step: jax.Array
    params: Any
    opt_state: Any


class Metrics(NamedTuple):
    """Numbers of one step.

    Args:
        loss: of its batch.
        grad_norm: of what the optimizer got.
        learning_rate: of its update.
        skipped: updates so far.
        bad_in_a_row: the latest consecutive ones of them.
        captured: share of each gradient that its subspace holds, on the steps that are looked at;
            nothing where gradients are not formed in full.
    """

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    skipped: jax.Array
    bad_in_a_row: jax.Array
    captured: dict[str, jax.Array]


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step; weights may be stored as integer codes."""
    # Optax's own transformations would take the codes for parameters.
    opt_state = tx.init(gj.quant.dequantize_params(params))
    return TrainState(jnp.zeros([], jnp.int32), params, opt_state)


def make_train_step(
    make_update: MakeUpdate,
    schedule: optax.Schedule,
    *,
    diagnostics_every: int = 0,
    rounding_key: jax.Array | None = None,
    state_sharding: TrainState | None = None,
) -> TrainStep:
    """One jitted update; the state's buffers are reused for the new state.

    INT8 and bf16 weights are rounded stochastically with the random numbers of `rounding_key` and
    the step; to nearest without it.

    With `state_sharding` the new state is where the old one was, and so its buffers serve again.

    Every `diagnostics_every` steps gradients in full are compared with their subspaces; 0 is never.

    The optimizer is a `gj.apply_if_finite`: it skips the update when a gradient is not finite, or
    the loss of one.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # A skipped update does not advance the optimizer's count, so nor does it the schedule.
        rate = schedule(state.step - state.opt_state.total_notfinite)
        made = make_update(state.params, state.opt_state, batch)
        key = None if rounding_key is None else jax.random.fold_in(rounding_key, state.step)
        params = gj.apply_updates(state.params, made.updates, key=key)
        metrics = Metrics(
            loss=made.loss,
            grad_norm=made.grad_norm,
            learning_rate=rate,
            skipped=made.opt_state.total_notfinite,
            bad_in_a_row=made.opt_state.notfinite_count,
            captured=_captured(made, state.step + 1, diagnostics_every),
        )
        return TrainState(state.step + 1, params, made.opt_state), metrics

    return _compiled(train_step, state_sharding)


def _forming_gradients(
    fn: Callable[..., Any], params: Any, opt_state: Any, *inputs: Any, layer: Any = 0
) -> Any:
    """A pullback that knows of no lens, so that every gradient is formed."""
    del opt_state, layer
    return gj.backward.pullback(fn, params, (), *inputs)


class Pieces(NamedTuple):
    """The model in three functions, as `galore_jax.layerwise.train_step` takes them."""

    embed: Callable[..., jax.Array]
    block: Callable[..., jax.Array]
    head: Callable[..., jax.Array]


def make_layerwise_step(
    pieces: Pieces,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    clip: float | None,
    projected: bool,
    micro_batches: int = 1,
    rounding_key: jax.Array | None = None,
    state_sharding: TrainState | None = None,
) -> TrainStep:
    """Like `make_train_step`, with one block's gradient at a time.

    `tx` is what the other step has inside `gj.apply_if_finite`. The state is the same, so that a
    run can go on with either; but a block whose gradient is not finite is skipped alone.
    """
    update = layerwise_update(
        pieces,
        tx,
        micro_batches,
        clip_norm=clip,
        pullback=gj.backward.pullback if projected else _forming_gradients,
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        guard = state.opt_state
        rate = schedule(state.step - guard.total_notfinite)
        key = None if rounding_key is None else jax.random.fold_in(rounding_key, state.step)
        params, inner_state, made = update(state.params, guard.inner_state, batch, key)
        fine = made.skipped == 0
        guard = guard._replace(
            notfinite_count=jnp.where(fine, 0, guard.notfinite_count + 1),
            last_finite=fine,
            total_notfinite=guard.total_notfinite + ~fine,
            inner_state=inner_state,
        )
        metrics = Metrics(
            loss=made.loss,
            grad_norm=made.grad_norm,
            learning_rate=rate,
            skipped=guard.total_notfinite,
            bad_in_a_row=guard.notfinite_count,
            captured={},
        )
        return TrainState(state.step + 1, params, guard), metrics

    return _compiled(train_step, state_sharding)


def _captured(made: Update, number: jax.Array, every: int) -> dict[str, jax.Array]:
    """What the subspaces that gradients were just projected onto hold of them; or zeros."""
    if not every or made.grads is None:
        return {}

    def look() -> dict[str, jax.Array]:
        return gj.captured_energy(made.grads, made.opt_state)

    def look_away() -> dict[str, jax.Array]:
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(look))

    return jax.lax.cond(number % every == 0, look, look_away)


def make_diagnosis(
    state_sharding: TrainState | None = None,
) -> Callable[[Any], dict[str, gj.SubspaceMetrics]]:
    """From an optimizer state to what it knows of its subspaces, the same on all devices."""
    return jax.jit(gj.metrics, out_shardings=state_sharding and state_sharding.step)


def _compiled(train_step: Callable[..., Any], state_sharding: TrainState | None) -> Any:
    # Without it the CPU backend copies stacked arrays that can be changed in place.
    options = (
        {"xla_cpu_copy_insertion_use_region_analysis": True}
        if jax.default_backend() == "cpu"
        else None
    )
    out = None if state_sharding is None else (state_sharding, state_sharding.step)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out, compiler_options=options)


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
