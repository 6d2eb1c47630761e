"""Longer gaps for matrices whose subspace has stopped moving."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.basis import BasisMove, first_cosine, overlap
from galore_jax.refresh.base import RefreshPolicy, check_gap

# Where a gap that may grow for ever stops growing: far beyond any run, far below int32.
_LONGEST = 2**30


class AdaptiveState(NamedTuple):
    """Memory of `adaptive`, one array per leaf.

    Args:
      gap: ``int32[*batch]``, steps between refreshes.
      similarities: ``float32[*batch, patience]``, the latest ones, oldest first; -patience where
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
      TypeError: A gap that is not an integer.

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
        check_gap(self.gap)
        if not 0 < self.threshold <= 1:
            raise ValueError(f"`threshold` is a similarity in (0, 1], got {self.threshold}.")
        if isinstance(self.patience, bool) or not isinstance(self.patience, int):
            raise TypeError(f"`patience` is a number of refreshes, got {self.patience!r}.")
        if self.patience < 1:
            raise ValueError(f"`patience` is at least one refresh, got {self.patience}.")
        if not self.growth > 1:
            raise ValueError(f"`growth` is a factor above one, got {self.growth}.")
        if self.max_gap is not None:
            check_gap(self.max_gap)
            if self.max_gap < self.gap:
                raise ValueError(f"`max_gap` {self.max_gap} is below the gap {self.gap}.")
        if self.mode not in ("overlap", "cosine"):
            raise ValueError(f"`mode` is 'overlap' or 'cosine', got {self.mode!r}.")

    @property
    def compares_columns(self) -> bool:
        return self.mode == "cosine"

    def init(self, treedef, places):
        shapes = [() if place is None else place.shape for place in places]
        return AdaptiveState(
            gap=treedef.unflatten(jnp.full(shape, self.gap, jnp.int32) for shape in shapes),
            similarities=treedef.unflatten(
                jnp.full((*shape, self.patience), -self.patience, jnp.float32) for shape in shapes
            ),
        )

    def gaps(self, places, memory):
        treedef: Any = jax.tree.structure(memory.gap)
        gaps = treedef.flatten_up_to(memory.gap)
        return [None if place is None else gap for place, gap in zip(places, gaps, strict=True)]

    def decide(self, count, places, memory, moves):
        treedef: Any = jax.tree.structure(memory.gap)
        gaps, similarities = (treedef.flatten_up_to(tree) for tree in memory)
        due: list[jax.Array | None] = []
        for i, move in enumerate(moves):
            if move is not None:
                gaps[i], similarities[i] = self._after(move, gaps[i], similarities[i])
            due.append(None if places[i] is None else count % gaps[i] == 0)
        return due, AdaptiveState(treedef.unflatten(gaps), treedef.unflatten(similarities))

    def _after(
        self, move: BasisMove, gap: jax.Array, similarities: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Gap and similarities after a step; nothing is computed where nothing moved."""
        return jax.lax.cond(
            jnp.any(move.moved & ~move.first),
            lambda: self._compare(move, gap, similarities),
            lambda: (gap, similarities),
        )

    def _compare(
        self, move: BasisMove, gap: jax.Array, similarities: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        measure = first_cosine if self.mode == "cosine" else overlap
        latest = measure(move.old, move.new).astype(jnp.float32)
        pushed = jnp.concatenate([similarities[..., 1:], latest[..., None]], axis=-1)
        compared = move.moved & ~move.first
        similarities = jnp.where(compared[..., None], pushed, similarities)
        still = compared & (jnp.mean(similarities, axis=-1) >= self.threshold)
        longest = _LONGEST if self.max_gap is None else self.max_gap
        grown = (gap.astype(jnp.float32) * self.growth).astype(jnp.int32)
        grown = jnp.minimum(jnp.maximum(grown, gap + 1), longest)  # short gaps grow, too
        return jnp.where(still, grown, gap), similarities
