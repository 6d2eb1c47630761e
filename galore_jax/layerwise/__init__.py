"""Training steps of which at most one block's gradient exists at a time."""

from galore_jax.layerwise.clipping import PreviousNormState, clip_by_previous_norm
from galore_jax.layerwise.train_step import Metrics, train_step

__all__ = ["Metrics", "PreviousNormState", "clip_by_previous_norm", "train_step"]
