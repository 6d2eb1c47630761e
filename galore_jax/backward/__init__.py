"""Backward passes that never form the gradients they are asked for."""

from galore_jax.backward.flax import dot_general, promote_dtype
from galore_jax.backward.gradient import projected_value_and_grad, pullback
from galore_jax.backward.weight import ProjectedWeight, einsum
from galore_jax.quant import matmul

__all__ = [
    "ProjectedWeight",
    "dot_general",
    "einsum",
    "matmul",
    "projected_value_and_grad",
    "promote_dtype",
    "pullback",
]
