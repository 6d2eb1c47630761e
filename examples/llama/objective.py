"""What is minimised: the mean negative log-likelihood of the next token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.llama import model

Batch = Mapping[str, jax.Array]


def loss(config: model.LlamaConfig, params: Mapping[str, Any], batch: Batch) -> jax.Array:
    """Mean nats per predicted token, a float32 scalar.

    Args:
        config: the model.
        params: parameter tree.
        batch: ``"inputs"`` and ``"targets"`` int32 [B, S], optionally ``"weights"`` [B, S].
    """
    return head_loss(config, params, model.hidden(config, params, batch["inputs"]), batch)


def head_loss(
    config: model.LlamaConfig, params: Mapping[str, Any], x: jax.Array, batch: Batch
) -> jax.Array:
    """The same from the activations in front of the head.

    With ``config.head_chunk`` the sequence is cut, and the logits of one piece exist at a time, in
    the backward pass as well.

    Args:
        config: the model.
        params: parameter tree; only ``"norm"`` and ``"lm_head"`` are read.
        x: activations [B, S, D].
        batch: see `loss`; the inputs are not read.

    Raises:
        ValueError: the pieces do not make up the sequence.
    """
    chunk, length = config.head_chunk, x.shape[1]
    if chunk is None or chunk >= length:
        return cross_entropy(model.head(config, params, x), batch["targets"], batch.get("weights"))
    if length % chunk:
        raise ValueError(f"head_chunk {chunk} does not divide the sequence length {length}")
    own = {name: params[name] for name in ("norm", "lm_head")}
    weights = batch.get("weights", jnp.ones(x.shape[:2], jnp.float32))

    @jax.checkpoint
    def piece(total: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        x, targets, weights = xs
        logits = model.head(config, own, x).astype(jnp.float32)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return total + jnp.sum(nats * weights), None

    def pieces(array: jax.Array) -> jax.Array:
        cut = array.reshape(array.shape[0], length // chunk, chunk, *array.shape[2:])
        return cut.swapaxes(0, 1)

    weights = weights.astype(jnp.float32)
    total, _ = jax.lax.scan(
        piece, jnp.zeros([]), (pieces(x), pieces(batch["targets"]), pieces(weights))
    )
    return total / _or_one(jnp.sum(weights))


def cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    """Mean negative log-likelihood in nats, in float32.

    Args:
        logits: [B, S, V].
        targets: int32 [B, S].
        weights: optional [B, S]; the mean is weighted by them, and 0 if all are zero.

    Returns:
        float32 scalar.
    """
    nats = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    if weights is None:
        return jnp.mean(nats)
    weights = weights.astype(jnp.float32)
    return jnp.sum(nats * weights) / _or_one(jnp.sum(weights))


def _or_one(total: jax.Array) -> jax.Array:
    return jnp.where(total > 0, total, 1.0)
