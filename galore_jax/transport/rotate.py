"""Transports that rewrite moments, for inner states whose moments are known: `rotate`, `reset`."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from galore_jax.transport.base import HIGHEST, BasisChange, Transport
from galore_jax.transport.moments import (
    Moments,
    check_known,
    decoded,
    encoded_like,
    map_moments,
)


class _CarriesMoments(Transport, abc.ABC):
    carries_state = True

    def check(self, inner_state, treedef):
        check_known(inner_state, treedef)

    def carry(self, inner_state, treedef, changes):
        def carry_leaf(leaf: int, moments: Moments) -> Moments:
            change = changes[leaf]
            if change is None:
                return moments
            # Of the steps that refresh something, only those that refresh this leaf pay.
            return jax.lax.cond(
                jnp.any(change.moved),
                lambda: self._carry_stored(moments, change),
                lambda: moments,
            )

        return map_moments(inner_state, treedef, carry_leaf)

    def _carry_stored(self, moments: Moments, change: BasisChange) -> Moments:
        wide, moved = decoded(moments), change.moved[..., None, None]
        carried = self._carry(wide, change)
        new = _mapped(lambda new, old: jnp.where(moved, new, old), carried, wide)
        return encoded_like(new, moments)

    @abc.abstractmethod
    def _carry(self, moments: Moments, change: BasisChange) -> Moments:
        """Moments of one leaf, ``[*batch, kept, rank]`` each, as if all its bases had moved."""


@dataclasses.dataclass(frozen=True)
class reset(_CarriesMoments):
    """Forgets the moments of a matrix whose basis moved.

    The bias-correction count is shared by all leaves and is not reset. With zeroed second moments
    Adam's next steps are therefore too long, up to (1 − b1)/√(1 − b2) = 3.2 times at first and
    about 6.5 times ten steps later (for b1 = 0.9, b2 = 0.999); `second="mean"` avoids it.

    Args:
      second: "zero", or "mean": every entry of the second moment becomes the mean over its
        matrix, so that directions are forgotten and the scale is not.

    Raises:
      ValueError: Another value of `second`.
      TypeError: In `init`, when the inner state holds arrays that are not registered moments.

    Example:
      >>> import galore_jax as gj
      >>> gj.transport.reset(second="mean")
      reset(second='mean')
    """

    second: Literal["zero", "mean"] = "zero"

    def __post_init__(self):
        if self.second not in ("zero", "mean"):
            raise ValueError(f"`second` is 'zero' or 'mean', got {self.second!r}.")

    def _carry(self, moments, change):
        del change

        def forget(second: jax.Array) -> jax.Array:
            if self.second == "zero":
                return jnp.zeros_like(second)
            finite = jnp.isfinite(second)  # one NaN would stay in the mean for ever
            mean = jnp.mean(second, (-2, -1), keepdims=True, where=finite)
            return jnp.broadcast_to(jnp.where(jnp.isfinite(mean), mean, 0), second.shape)

        return moments._replace(
            first=jax.tree.map(jnp.zeros_like, moments.first),
            second=jax.tree.map(forget, moments.second),
        )


@dataclasses.dataclass(frozen=True)
class rotate(_CarriesMoments):
    """Expresses the moments in the new basis.

    With C = P_newᵀ·P_old (rank × rank), low-rank arrays in rows, hats for bias-corrected values
    and w = 1 − b2ᵗ:

      m ← m·Cᵀ
      v ← w·|(v̂ − m̂²)·(C∘C)ᵀ + (m̂·Cᵀ)²| + (1 − rowsum(C∘C))·mean(v)

    The first part is exact for uncorrelated coordinates (LDAdam). The last term is a floor for
    directions that the old subspace did not contain: they take the mean of their row of v instead
    of nearly zero, which would make their first steps far too long.

    Args:
      b1: Decay of the inner transformation's first moments.
      b2: Decay of its second moments.

    Raises:
      ValueError: A decay outside [0, 1).
      TypeError: In `init`, when the inner state holds arrays that are not registered moments.

    Example:
      >>> import galore_jax as gj
      >>> tx = gj.galore_adamw(1e-2, b2=0.99, transport=gj.transport.rotate(b2=0.99))

    References:
      Robert et al., "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics", 2024
      (https://arxiv.org/abs/2410.16103).
    """

    b1: float = 0.9
    b2: float = 0.999
    needs_orthonormal = True

    def __post_init__(self):
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")

    def _carry(self, moments, change):
        turn = _right_product(change.new.mT, change.old.mT)  # C, [*batch, rank, rank]
        wide = _widened(moments)
        first = {name: _right_product(m, turn) for name, m in wide.first.items()}
        second = {name: self._carry_second(v, wide, turn) for name, v in wide.second.items()}
        new = moments._replace(first=first, second=second)
        return _mapped(lambda x, like: x.astype(like.dtype), new, moments)

    def _carry_second(self, v: jax.Array, moments: Moments, turn: jax.Array) -> jax.Array:
        m = next(iter(moments.first.values()), jnp.zeros_like(v))
        squared = turn * turn
        bias1, bias2 = (_bias(decay, moments.count, v.dtype) for decay in (self.b1, self.b2))
        m_hat = m / bias1
        variance = _right_product(v / bias2 - m_hat**2, squared)
        unseen = jnp.maximum(1 - jnp.sum(squared, axis=-1), 0)[..., None, :].astype(v.dtype)
        floor = unseen * jnp.mean(v, axis=-1, keepdims=True)
        return bias2 * jnp.abs(variance + _right_product(m_hat, turn) ** 2) + floor


def _bias(decay: float, count: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
    """1 − decayᵗ; one for a state that does not count."""
    if count is None:
        return jnp.ones((), dtype)
    return 1 - jnp.asarray(decay, dtype) ** jnp.maximum(count, 1).astype(dtype)


def _widened(moments: Moments) -> Moments:
    """At least fp32: in 16 bits a decay of 0.999 is one."""

    def wide(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x

    return _mapped(wide, moments)


def _mapped(fn: Callable[..., jax.Array], moments: Moments, *others: Moments) -> Moments:
    """`fn` of all moments of one leaf; the count stays."""
    first, second = (
        jax.tree.map(fn, *(fields[i] for fields in (moments, *others))) for i in range(2)
    )
    return moments._replace(first=first, second=second)


def _right_product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x·matrixᵀ on the last axes, in x's dtype."""
    return jnp.einsum("...kr,...sr->...ks", x, matrix.astype(x.dtype), precision=HIGHEST)
