"""Longer gaps for matrices whose subspace has stopped moving."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.checks import check_count, check_number
from galore_jax.refresh.base import RefreshPolicy

# Where a gap that may grow for ever stops growing: far beyond any run, far below int32.
_LONGEST = 2**30


class AdaptiveState(NamedTuple):
    """Memory of `adaptive`.

    Args:
      gap: ``int32[*matrices]``, steps between refreshes.
      similarities: ``float32[*matrices, patience]``, the latest ones, oldest first; -patience where
        there has not been one yet, so that no mean with such a place reaches a threshold.
    """

    gap: Any
    similarities: Any


@dataclasses.dataclass(frozen=True)
class adaptive(RefreshPolicy):
    r"""Refreshes at multiples of a gap that grows, per matrix, once its subspace holds still.

    At every refresh the new basis is compared with the old one. When the mean of the last
    `patience` similarities is at least `threshold`, the gap is multiplied by `growth`. The
    similarity is the share of the old subspace that lies in the new one,
    :math:`\|P_{old}^\top P_{new}\|_F^2 / r`, which knows nothing of signs and rotations. Two random
    subspaces have rank / projected on average: choose `threshold` well above.

    Args:
      gap: Steps between refreshes at first.
      threshold: Similarity from which a subspace counts as still, in (0, 1].
      patience: Refreshes that are averaged; as many have to pass before the gap grows at all.
      growth: Factor on the gap, above one.
      max_gap: Longest gap; None for no limit.
      mode: "overlap" as above; "cosine" is the rule of the Q-GaLore code, the cosine between the
        first columns only (here without its sign). It needs a projector and a transport that leave
        columns in their places: `svd` or `gram_eigh`, and not `align`.

    Raises:
      ValueError: A number out of its range, or an unknown mode.
      TypeError: A gap that is not an integer, or another argument that is not a number.

    Example:
      >>> import galore_jax as gj
      >>> tx = gj.galore_adamw(1e-2, update_proj_gap=gj.refresh.adaptive(200, max_gap=3200))

    References:
      Zhang et al., "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank
      Gradients", 2024, section 3.2 (https://arxiv.org/abs/2407.08296).
    """

    gap: int
    threshold: float = 0.6
    patience: int = 5
    growth: float = 2.0
    max_gap: int | None = None
    mode: Literal["overlap", "cosine"] = "overlap"

    def __post_init__(self):
        object.__setattr__(self, "gap", check_count("gap", self.gap))
        object.__setattr__(self, "patience", check_count("patience", self.patience))
        check_number("threshold", self.threshold)
        check_number("growth", self.growth)
        if not 0 < self.threshold <= 1:
            raise ValueError(f"`threshold` is a similarity in (0, 1], got {self.threshold}.")
        if not self.growth > 1:
            raise ValueError(f"`growth` is a factor above one, got {self.growth}.")
        if self.max_gap is not None:
            object.__setattr__(self, "max_gap", check_count("max_gap", self.max_gap))
            if self.max_gap < self.gap:
                raise ValueError(f"`max_gap` {self.max_gap} is below the gap {self.gap}.")
        if self.mode not in ("overlap", "cosine"):
            raise ValueError(f"`mode` is 'overlap' or 'cosine', got {self.mode!r}.")

    @property
    def compares_columns(self) -> bool:
        return self.mode == "cosine"

    @property
    def similarity(self):
        return first_cosine if self.mode == "cosine" else None

    def init(self, matrices):
        shape = jnp.shape(matrices.phase)
        return AdaptiveState(
            gap=jnp.full(shape, self.gap, jnp.int32),
            similarities=jnp.full((*shape, self.patience), -self.patience, jnp.float32),
        )

    def current_gap(self, memory):
        return memory.gap

    def decide(self, count, memory, seen):
        gap, similarities = memory
        latest = seen.similarity[..., None]
        pushed = jnp.concatenate([similarities[..., 1:], latest], axis=-1)
        similarities = jnp.where(seen.compared[..., None], pushed, similarities)
        is_still = seen.compared & (jnp.mean(similarities, axis=-1) >= self.threshold)
        longest = max(self.gap, _LONGEST) if self.max_gap is None else self.max_gap
        grown = jnp.minimum(gap.astype(jnp.float32) * self.growth, _LONGEST).astype(jnp.int32)
        longer = jnp.minimum(gap, longest - 1) + 1  # short gaps grow, too
        grown = jnp.minimum(jnp.maximum(grown, longer), longest)
        gap = jnp.where(is_still, grown, gap)
        return count % gap == 0, AdaptiveState(gap, similarities)


def first_cosine(old: jax.Array, new: jax.Array) -> jax.Array:
    """``|cos|`` of the angle between the first columns, ``[*batch]``."""
    return jnp.abs(jnp.sum(old[..., 0] * new[..., 0], axis=-1))
