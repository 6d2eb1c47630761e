"""When a basis is recomputed."""

from galore_jax.refresh.adaptive import adaptive
from galore_jax.refresh.base import MatrixSlots, RefreshPolicy
from galore_jax.refresh.every import as_policy, every
from galore_jax.refresh.staggered import staggered

__all__ = ["MatrixSlots", "RefreshPolicy", "adaptive", "as_policy", "every", "staggered"]
