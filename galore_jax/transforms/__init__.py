"""Gradient transformations."""

from galore_jax.transforms.factored_rms import FactoredRmsState, scale_by_factored_rms
from galore_jax.transforms.low_rank import LowRankState, RefreshState, low_rank_projection

__all__ = [
    "FactoredRmsState",
    "LowRankState",
    "RefreshState",
    "low_rank_projection",
    "scale_by_factored_rms",
]
