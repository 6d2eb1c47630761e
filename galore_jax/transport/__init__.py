"""Treatments of the inner state when a basis moves."""

from galore_jax.transport.align import align, keep
from galore_jax.transport.base import BasisChange, Transport
from galore_jax.transport.moments import register_moment
from galore_jax.transport.rotate import reset, rotate

__all__ = ["BasisChange", "Transport", "align", "keep", "register_moment", "reset", "rotate"]
