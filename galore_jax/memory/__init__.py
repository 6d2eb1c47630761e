"""Bytes of weights and optimizer state, by what they are for and by leaf."""

from galore_jax.memory.account import LeafMemory, Memory, Roles, estimate, report

__all__ = ["LeafMemory", "Memory", "Roles", "estimate", "report"]
