"""When a basis is recomputed."""

from galore_jax.refresh.adaptive import adaptive
from galore_jax.refresh.base import RefreshPolicy, places_of
from galore_jax.refresh.every import as_policy, every
from galore_jax.refresh.staggered import staggered

__all__ = ["RefreshPolicy", "adaptive", "as_policy", "every", "places_of", "staggered"]
