"""Policies that say when a basis is recomputed."""

from galore_jax.refresh.adaptive import adaptive
from galore_jax.refresh.base import Matrices, Observation, RefreshPolicy
from galore_jax.refresh.every import as_policy, every
from galore_jax.refresh.staggered import phases, staggered

__all__ = [
    "Matrices",
    "Observation",
    "RefreshPolicy",
    "adaptive",
    "as_policy",
    "every",
    "phases",
    "staggered",
]
