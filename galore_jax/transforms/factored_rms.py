"""Adafactor's second moment for stacks of matrices."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class FactoredRmsState(NamedTuple):
    """State of `scale_by_factored_rms`, one array per leaf in each tree.

    Args:
      count: int32 scalar, steps.
      rows: ``[*batch, kept]`` row means of squared gradients (the full average for a vector).
      columns: ``[*batch, rank]`` column means (a scalar zero for a vector).
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name for it
    rows: optax.Updates
    columns: optax.Updates


def scale_by_factored_rms(
    decay_rate: float = 0.8, epsilon: float = 1e-30, clipping_threshold: float | None = 1.0
) -> optax.GradientTransformation:
    r"""Divides by a rank-one estimate of the RMS, matrix by matrix.

    For every matrix :math:`G` (the last two axes; all others are batch axes), with row and column
    means :math:`\rho, \kappa` of the running average of :math:`G^2`,

    .. math::
      V_{ij} = \rho_i \kappa_j / \mathrm{mean}(\rho), \qquad U = G / \sqrt{V}, \qquad
      U / \max(1, \mathrm{rms}(U) / d)

    at decay :math:`1 - (t + 1)^{-c}`. Unlike `optax.scale_by_factored_rms` it factors however
    small the matrix is (optax leaves dimensions under 128 alone, hence most ranks), never takes a
    batch axis for a matrix axis, clips each matrix by itself, and needs no ``params``. Leaves with
    fewer than two axes keep a full average.

    Args:
      decay_rate: c, the exponent of the decay schedule.
      epsilon: Added to the squared gradient.
      clipping_threshold: d, the largest RMS of an update; None for no clipping.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> gj.scale_by_factored_rms().init({"w": jnp.ones((24, 64, 4))}).rows["w"].shape
      (24, 64)

    References:
      Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018.
    """

    def init_fn(params: optax.Params) -> FactoredRmsState:
        return FactoredRmsState(
            count=jnp.zeros((), jnp.int32),
            rows=jax.tree.map(
                lambda p: jnp.zeros(p.shape[:-1] if p.ndim > 1 else p.shape, p.dtype), params
            ),
            columns=jax.tree.map(
                lambda p: jnp.zeros((*p.shape[:-2], p.shape[-1]) if p.ndim > 1 else (), p.dtype),
                params,
            ),
        )

    def update_fn(
        updates: optax.Updates, state: FactoredRmsState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, FactoredRmsState]:
        del params
        decay = 1 - (state.count + 1).astype(jnp.float32) ** -decay_rate

        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            weight = decay.astype(old.dtype)
            return weight * old + (1 - weight) * new

        def over_columns(g: jax.Array, old: jax.Array) -> jax.Array:
            squared = g * g + epsilon
            return average(old, jnp.mean(squared, axis=-1) if g.ndim > 1 else squared)

        def over_rows(g: jax.Array, old: jax.Array) -> jax.Array:
            return average(old, jnp.mean(g * g + epsilon, axis=-2)) if g.ndim > 1 else old

        def normalize(g: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
            if g.ndim < 2:
                return g * jax.lax.rsqrt(row)
            relative = row / jnp.mean(row, axis=-1, keepdims=True)
            return g * jax.lax.rsqrt(relative)[..., None] * jax.lax.rsqrt(column)[..., None, :]

        def clip(update: jax.Array) -> jax.Array:
            if clipping_threshold is None:
                return update
            axes = tuple(range(update.ndim))[-2:]
            rms = jnp.sqrt(jnp.mean(update * update, axis=axes, keepdims=True))
            return update / jnp.maximum(1, rms / clipping_threshold)

        rows = jax.tree.map(over_columns, updates, state.rows)
        columns = jax.tree.map(over_rows, updates, state.columns)
        normalized = jax.tree.map(normalize, updates, rows, columns)
        return jax.tree.map(clip, normalized), FactoredRmsState(
            optax.safe_increment(state.count), rows, columns
        )

    return optax.GradientTransformation(init_fn, update_fn)
