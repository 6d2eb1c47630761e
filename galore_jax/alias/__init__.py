"""The optimizers people type: lens -> decoupled weight decay -> learning rate."""

from galore_jax.alias.adafactor import galore_adafactor
from galore_jax.alias.adamw import galore_adamw
from galore_jax.alias.adamw8bit import galore_adamw8bit, q_galore_adamw8bit
from galore_jax.alias.base import STATIC_ARGS
from galore_jax.alias.galore import galore
from galore_jax.alias.lion import galore_lion
from galore_jax.alias.sgd import galore_sgd

__all__ = [
    "STATIC_ARGS",
    "galore",
    "galore_adafactor",
    "galore_adamw",
    "galore_adamw8bit",
    "galore_lion",
    "galore_sgd",
    "q_galore_adamw8bit",
]
