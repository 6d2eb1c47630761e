"""Gradient transformations."""

from galore_jax.transforms.accumulate import accumulate
from galore_jax.transforms.apply_if_finite import apply_if_finite
from galore_jax.transforms.apply_updates import apply_updates
from galore_jax.transforms.factored_rms import FactoredRmsState, scale_by_factored_rms
from galore_jax.transforms.low_rank import low_rank_projection
from galore_jax.transforms.quantized_state import quantized_state, scale_by_adam8bit
from galore_jax.transforms.state import AccumulateState, LowRankState, RefreshState

__all__ = [
    "AccumulateState",
    "FactoredRmsState",
    "LowRankState",
    "RefreshState",
    "accumulate",
    "apply_if_finite",
    "apply_updates",
    "low_rank_projection",
    "quantized_state",
    "scale_by_adam8bit",
    "scale_by_factored_rms",
]
