"""Nodes of this library for `flax.serialization`, which has a registry of its own."""

from __future__ import annotations

import dataclasses
import sys

# Types, and the names of their parts, until Flax has them.
_NODES: dict[type, tuple[str, ...]] = {}


def register(cls: type, *fields: str) -> None:
    """Makes a dataclass known to Flax, as soon as Flax is there.

    Args:
      cls: The type of a pytree node.
      *fields: Names of its parts; Flax keeps the rest of the node that it restores into.
    """
    _NODES[cls] = fields
    tell_flax()


def tell_flax() -> None:
    """Registers what is not yet registered; nothing without Flax in the process."""
    # Looked up, not imported. Whoever saves a state has imported it before making one, as a rule.
    flax = sys.modules.get("flax.serialization")
    if flax is None or not hasattr(flax, "register_serialization_state"):
        return
    for cls, fields in _NODES.items():
        flax.register_serialization_state(
            cls,
            lambda node, fields=fields: {name: getattr(node, name) for name in fields},
            lambda node, parts: dataclasses.replace(node, **parts),
            override=True,
        )
    _NODES.clear()
