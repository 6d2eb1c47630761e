"""Treatments of the part of a gradient that its basis leaves out."""

from galore_jax.recovery.base import Leaving, Recovery
from galore_jax.recovery.drop import drop

__all__ = ["Leaving", "Recovery", "drop"]
