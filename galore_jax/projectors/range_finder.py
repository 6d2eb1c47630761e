"""Bases from a few products: the randomized range finder, its warm start, orthonormal columns."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from galore_jax.checks import check_bool, check_count
from galore_jax.keys import uniform
from galore_jax.projectors.base import Projector
from galore_jax.projectors.operator import HIGHEST, MatrixOperator

# Relative diagonal shifts of the three Cholesky passes. The first two keep the factorization
# alive for columns that are nearly dependent; the last, unshifted, makes them orthonormal.
_SHIFTS = (1e-6, 1e-7, 0.0)
# Share of `fill` mixed into each unit column: supplies the missing directions of a
# rank-deficient input without turning those it has.
_FILL = 1e-4


@dataclasses.dataclass(frozen=True)
class randomized_svd(Projector):
    """Randomized range finder, started from the previous basis when there is one.

    Y ← orth(Gᵀ·(G·Y)), once for the sketch and `power_iters` times more, from a random Y.
    A warm start puts the previous basis in the place of the sketch and only iterates: it has seen
    the gradient before. P = Y; with oversampling, its `rank` directions of largest energy.

    Products and rank-sized factorizations only: it runs at matmul speed on accelerators, never
    gathers a sharded gradient, and needs the gradient only through G·V and Gᵀ·U.

    Args:
      oversample: Extra columns. They cost one more product and a rank-sized eigenvalue problem,
        and pay for a cold start on a slowly decaying spectrum.
      power_iters: Multiplications by GᵀG beyond that of the sketch.
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
        check_bool("warm_start", self.warm_start)
        least = {"oversample": 0, "power_iters": 1 if self.warm_start else 0}
        for name, smallest in least.items():
            count = check_count(name, getattr(self, name), least=smallest)
            object.__setattr__(self, name, count)

    def basis(self, gradient: MatrixOperator, rank, *, previous, refreshes, key):
        width = min(rank + self.oversample, *gradient.shape)
        sketch = refreshes == 0 if self.warm_start else jnp.ones((), bool)
        start = _start(previous.astype(gradient.dtype), width, sketch, key)
        columns = _power(gradient, start, self.power_iters + sketch.astype(jnp.int32))
        return columns if width == rank else _leading(gradient.normalized(), columns, rank)


@dataclasses.dataclass(frozen=True)
class subspace_iteration(Projector):
    """Block power iteration from the previous basis: P = orth((GᵀG)^steps · P_old).

    The first time it starts from a random subspace. The same work at every refresh, the first one
    included; `randomized_svd` gives a cold start one multiplication more.

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
        object.__setattr__(self, "steps", check_count("steps", self.steps))

    def basis(self, gradient: MatrixOperator, rank, *, previous, refreshes, key):
        start = _start(previous.astype(gradient.dtype), rank, refreshes == 0, key)
        return _power(gradient, start, jnp.asarray(self.steps))


def _start(previous: jax.Array, width: int, sketch: jax.Array, key: jax.Array) -> jax.Array:
    """``[projected, width]``: `previous` and random columns; only random ones for a `sketch`."""
    rows, rank = previous.shape

    def random_columns(count: int) -> jax.Array:
        return uniform(key, (rows, count), previous.dtype) * math.sqrt(3 / rows)

    def extend() -> jax.Array:
        if width == rank:
            return previous
        return jnp.concatenate([previous, random_columns(width - rank)], axis=-1)

    return jax.lax.cond(sketch, lambda: random_columns(width), extend)


def _power(gradient: MatrixOperator, start: jax.Array, steps: jax.Array) -> jax.Array:
    """orth((GᵀG)^steps · start); directions that the gradient lacks come from `start`."""

    normalized = gradient.normalized()

    def step(_: jax.Array, columns: jax.Array) -> jax.Array:
        return orthonormalize(normalized.rmatmul(normalized.matmul(columns)), fill=columns)

    # A loop with a traced count: one copy of the code serves cold and warm starts.
    return jax.lax.fori_loop(0, steps, step, start)


def _leading(gradient: MatrixOperator, columns: jax.Array, rank: int) -> jax.Array:
    """The `rank` directions of largest energy within the span of orthonormal `columns`."""
    image = gradient.matmul(columns)
    _, vectors = jnp.linalg.eigh(jnp.matmul(image.T, image, precision=HIGHEST))
    return jnp.matmul(columns, vectors[:, ::-1][:, :rank], precision=HIGHEST)


def orthonormalize(columns: jax.Array, fill: jax.Array) -> jax.Array:
    """Orthonormal basis of the span of `columns`, completed by directions of `fill`.

    Three passes of shifted Cholesky QR: Q ← Q·L⁻ᵀ with L·Lᵀ = QᵀQ + shift. Only tall-times-small
    products touch the long axis, so it runs at matmul speed on accelerators and a sharded long
    axis is never gathered (a triangular solve on it would be).

    Args:
      columns: ``[n, k]``, k ≤ n, finite, its squares too; may be zero or rank-deficient.
      fill: ``[n, k]`` with independent columns of about unit norm.

    Returns:
      ``[n, k]`` with max|QᵀQ − I| around 1e-6 in fp32.

    References:
      Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of ill-conditioned
      matrices", 2020.
    """
    norms = jnp.sqrt(jnp.sum(columns * columns, axis=0, keepdims=True))
    mixed = columns / jnp.where(norms > 0, norms, 1) + _FILL * fill
    identity = jnp.eye(columns.shape[-1], dtype=columns.dtype)
    shifts = jnp.asarray(_SHIFTS, columns.dtype)

    def cholesky_pass(i: jax.Array, q: jax.Array) -> jax.Array:
        gram = jnp.matmul(q.T, q, precision=HIGHEST)
        shifted = gram + shifts[i] * jnp.trace(gram) * identity
        lower = jax.lax.linalg.cholesky(shifted, symmetrize_input=False)
        inverse = jax.lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
        return jnp.matmul(q, inverse.T, precision=HIGHEST)

    # A loop, not three copies: a third of the compile time.
    return jax.lax.fori_loop(0, len(_SHIFTS), cholesky_pass, mixed)
