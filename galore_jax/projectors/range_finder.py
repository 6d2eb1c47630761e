"""Bases from a few products with the gradient: the randomized range finder and its warm start."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from galore_jax.projectors.base import Projector
from galore_jax.projectors.operator import HIGHEST, MatrixOperator
from galore_jax.projectors.orthonormal import orthonormalize


@dataclasses.dataclass(frozen=True)
class randomized_svd(Projector):
    """Randomized range finder, started from the previous basis when there is one.

    Cold:  Y = Gᵀ·Ω with a Gaussian Ω.      Warm:  Y = [P_old, Gᵀ·Ω] (Ω has `oversample` columns).
    Then `power_iters` times  Y ← Gᵀ·(G·orth(Y)),  P = orth(Y); with oversampling the `rank`
    columns of largest energy are kept.

    Products and rank-sized factorizations only: it runs at matmul speed on accelerators, never
    gathers a sharded gradient, and needs the gradient only through G·V and Gᵀ·U.

    Args:
      oversample: Extra columns of the sketch. They cost one more product and a small eigenvalue
        problem, and pay for a cold start on a slowly decaying spectrum.
      power_iters: Multiplications by GᵀG after the first sketch.
      warm_start: Start from the previous basis. False sketches from scratch at every refresh.

    Raises:
      ValueError: A negative count, or a warm start without a power iteration (which would return
        the previous basis).

    Example:
      >>> import galore_jax as gj
      >>> gj.projectors.randomized_svd(power_iters=2)
      randomized_svd(oversample=0, power_iters=2, warm_start=True)

    References:
      Halko, Martinsson and Tropp, "Finding structure with randomness", 2011, algorithm 4.4.
      Su et al., "GaLore 2", 2025 (https://arxiv.org/abs/2504.20437).
    """

    oversample: int = 0
    power_iters: int = 1
    warm_start: bool = True

    def __post_init__(self):
        _check_count("oversample", self.oversample, least=0)
        _check_count("power_iters", self.power_iters, least=1 if self.warm_start else 0)

    def basis(self, gradient: MatrixOperator, rank, *, previous, cold, key):
        width = min(rank + self.oversample, *gradient.shape)
        previous = previous.astype(gradient.dtype)
        fill = _complete(previous, width, key)

        def sketch() -> jax.Array:
            return orthonormalize(_sketch(gradient, width, key), fill)

        def extend() -> jax.Array:
            if width == rank:
                return previous
            extra = _sketch(gradient, width - rank, key)
            return orthonormalize(jnp.concatenate([previous, extra], axis=-1), fill)

        start = jax.lax.cond(cold, sketch, extend) if self.warm_start else sketch()
        columns = _power(gradient, start, self.power_iters, fill)
        return columns if width == rank else _leading(gradient, columns, rank)


@dataclasses.dataclass(frozen=True)
class subspace_iteration(Projector):
    """Block power iteration from the previous basis: P = orth((GᵀG)^steps · P_old).

    The first time it starts from a random subspace. Differs from `randomized_svd` in drawing no
    sketch of the gradient: every start costs the same products.

    Args:
      steps: Multiplications by GᵀG per refresh.

    Raises:
      ValueError: `steps` below one.

    Example:
      >>> import galore_jax as gj
      >>> gj.projectors.subspace_iteration(steps=2)
      subspace_iteration(steps=2)
    """

    steps: int = 1

    def __post_init__(self):
        _check_count("steps", self.steps, least=1)

    def basis(self, gradient: MatrixOperator, rank, *, previous, cold, key):
        previous = previous.astype(gradient.dtype)

        def random_start() -> jax.Array:
            columns = jax.random.normal(key, previous.shape, previous.dtype)
            return orthonormalize(columns, fill=previous)

        start = jax.lax.cond(cold, random_start, lambda: previous)
        return _power(gradient, start, self.steps, fill=previous)


def _sketch(gradient: MatrixOperator, width: int, key: jax.Array) -> jax.Array:
    """Gᵀ·Ω, ``[projected, width]``."""
    omega = jax.random.normal(key, (gradient.shape[0], width), gradient.dtype)
    return gradient.rmatmul(omega)


def _power(gradient: MatrixOperator, columns: jax.Array, steps: int, fill: jax.Array) -> jax.Array:
    for _ in range(steps):
        columns = orthonormalize(gradient.rmatmul(gradient.matmul(columns)), fill)
    return columns


def _complete(previous: jax.Array, width: int, key: jax.Array) -> jax.Array:
    """`previous` with random columns of about unit norm up to `width`."""
    rows, rank = previous.shape
    if width == rank:
        return previous
    extra = jax.random.normal(key, (rows, width - rank), previous.dtype) / math.sqrt(rows)
    return jnp.concatenate([previous, extra], axis=-1)


def _leading(gradient: MatrixOperator, columns: jax.Array, rank: int) -> jax.Array:
    """The `rank` directions of largest energy within the span of orthonormal `columns`."""
    image = gradient.matmul(columns)
    _, vectors = jnp.linalg.eigh(jnp.matmul(image.T, image, precision=HIGHEST))
    return jnp.matmul(columns, vectors[:, ::-1][:, :rank], precision=HIGHEST)


def _check_count(name: str, value: int, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
