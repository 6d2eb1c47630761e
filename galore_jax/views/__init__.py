"""Leaves as batches of matrices, and the choice of those that are projected."""

from galore_jax.views.axes import MatrixAxes
from galore_jax.views.matrix_view import MatrixView
from galore_jax.views.plan import LeafPlan, leaf_plan
from galore_jax.views.projected_gradient import ProjectedGradient
from galore_jax.views.targets import all_matrices

__all__ = [
    "LeafPlan",
    "MatrixAxes",
    "MatrixView",
    "ProjectedGradient",
    "all_matrices",
    "leaf_plan",
]
