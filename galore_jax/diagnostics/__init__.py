"""What a person looks at while a model trains: how subspaces move, and what they hold."""

from galore_jax.diagnostics.energy import captured_energy
from galore_jax.diagnostics.metrics import SubspaceMetrics, metrics

__all__ = ["SubspaceMetrics", "captured_energy", "metrics"]
