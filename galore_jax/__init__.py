"""GaLore, Q-GaLore and GaLore 2 as composable Optax gradient transformations."""

from galore_jax import codecs, projectors, refresh, transport, views
from galore_jax.alias import (
    STATIC_ARGS,
    galore,
    galore_adafactor,
    galore_adamw,
    galore_lion,
    galore_sgd,
)
from galore_jax.describe import describe
from galore_jax.transforms import LowRankState, low_rank_projection, scale_by_factored_rms
from galore_jax.views import MatrixAxes, ProjectedGradient, all_matrices

__version__ = "0.1.0"

__all__ = [
    "STATIC_ARGS",
    "LowRankState",
    "MatrixAxes",
    "ProjectedGradient",
    "all_matrices",
    "codecs",
    "describe",
    "galore",
    "galore_adafactor",
    "galore_adamw",
    "galore_lion",
    "galore_sgd",
    "low_rank_projection",
    "projectors",
    "refresh",
    "scale_by_factored_rms",
    "transport",
    "views",
]
