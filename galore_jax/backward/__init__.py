"""Backward passes that never form the gradients they are asked for."""

from galore_jax.backward.gradient import projected_value_and_grad, pullback
from galore_jax.backward.weight import ProjectedWeight, einsum, matmul

__all__ = ["ProjectedWeight", "einsum", "matmul", "projected_value_and_grad", "pullback"]
