"""GaLore, Q-GaLore and GaLore 2 as composable Optax gradient transformations."""

from galore_jax import (
    backward,
    codecs,
    layerwise,
    memory,
    projectors,
    quant,
    recovery,
    refresh,
    transport,
    views,
)
from galore_jax.alias import (
    STATIC_ARGS,
    galore,
    galore_adafactor,
    galore_adamw,
    galore_adamw8bit,
    galore_lion,
    galore_sgd,
    q_galore_adamw8bit,
)
from galore_jax.backward import matmul, projected_value_and_grad
from galore_jax.describe import describe
from galore_jax.metrics import SubspaceMetrics, captured_energy, metrics
from galore_jax.sharding import init_sharded, state_sharding
from galore_jax.transforms import (
    LowRankState,
    accumulate,
    apply_if_finite,
    apply_updates,
    low_rank_projection,
    quantized_state,
    scale_by_adam8bit,
    scale_by_factored_rms,
)
from galore_jax.views import MatrixAxes, ProjectedGradient, all_matrices

__version__ = "0.1.0"

__all__ = [
    "STATIC_ARGS",
    "LowRankState",
    "MatrixAxes",
    "ProjectedGradient",
    "SubspaceMetrics",
    "accumulate",
    "all_matrices",
    "apply_if_finite",
    "apply_updates",
    "backward",
    "captured_energy",
    "codecs",
    "describe",
    "galore",
    "galore_adafactor",
    "galore_adamw",
    "galore_adamw8bit",
    "galore_lion",
    "galore_sgd",
    "init_sharded",
    "layerwise",
    "low_rank_projection",
    "matmul",
    "memory",
    "metrics",
    "projected_value_and_grad",
    "projectors",
    "q_galore_adamw8bit",
    "quant",
    "quantized_state",
    "recovery",
    "refresh",
    "scale_by_adam8bit",
    "scale_by_factored_rms",
    "state_sharding",
    "transport",
    "views",
]
