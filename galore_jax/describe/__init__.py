"""The table a person wants: what happens to every leaf of a model."""

from galore_jax.describe.leaves import Description, LeafDescription, LeafSharding, describe

__all__ = ["Description", "LeafDescription", "LeafSharding", "describe"]
