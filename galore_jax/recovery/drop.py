"""Nothing is recovered."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from galore_jax.recovery.base import Leaving, Recovery


@dataclasses.dataclass(frozen=True)
class drop(Recovery):
    r"""Lifts the direction, and drops what the basis leaves out (GaLore).

    .. math::
      \Delta = \alpha\, N P^\top

    Example:
      >>> import galore_jax as gj
      >>> gj.recovery.drop()
      drop()

    References:
      Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024
      (https://arxiv.org/abs/2403.03507).
    """

    def leave(self, leaving: Leaving, memory):
        direction = leaving.direction
        scaled = direction * jnp.asarray(leaving.scale, direction.dtype)  # while it is small
        return leaving.view.lift(scaled, leaving.basis, leaving.dtype), memory
