"""Nodes of this library for `flax.serialization`, which has a registry of its own."""

from __future__ import annotations

import dataclasses
import sys

# Types, and the names of their parts, until Flax has them.
_NODES: dict[type, tuple[str, ...]] = {}


class Known(type):
    """Class of the types that Flax is to know.

    Flax looks types up in a dictionary, and may have been imported after a state was made. The
    look-up asks for the hash of the type: the latest moment at which it can still be registered.
    """

    def __hash__(cls) -> int:
        if _NODES:
            tell_flax()
        return type.__hash__(cls)


def register(cls: type, *fields: str) -> None:
    """Makes a dataclass known to Flax, as soon as Flax is there.

    Args:
      cls: The type of a pytree node, of the class `Known`.
      *fields: Names of its parts; Flax keeps the rest of the node that it restores into.
    """
    _NODES[cls] = fields
    tell_flax()


def tell_flax() -> None:
    """Registers what is not yet registered; nothing without Flax in the process."""
    flax = sys.modules.get("flax.serialization")  # looked up, not imported
    if flax is None or not hasattr(flax, "register_serialization_state"):
        return
    nodes = dict(_NODES)
    _NODES.clear()
    for cls, fields in nodes.items():
        flax.register_serialization_state(
            cls,
            lambda node, fields=fields: {name: getattr(node, name) for name in fields},
            lambda node, parts: dataclasses.replace(node, **parts),
            override=True,
        )
