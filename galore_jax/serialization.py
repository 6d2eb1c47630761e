"""Nodes of this library for `flax.serialization`, which has a registry of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

# Functions that take each type apart and put it together again, until Flax has them.
_NODES: dict[type, tuple[Callable[..., Any], Callable[..., Any]]] = {}


class Known(type):
    """Class of the types that Flax is to know.

    Flax looks types up in a dictionary, and may have been imported after a state was made. The
    look-up asks for the hash of the type: the latest moment at which it can still be registered.
    """

    def __hash__(cls) -> int:
        if _NODES:
            tell_flax()
        return type.__hash__(cls)


def register(
    cls: type,
    to_dict: Callable[[Any], dict[str, Any]],
    from_dict: Callable[[Any, dict[str, Any]], Any],
) -> None:
    """Makes a type known to Flax, as soon as Flax is there.

    Args:
      cls: The type of a pytree node, of the class `Known`.
      to_dict: Node -> its parts by name.
      from_dict: ``(node of the same kind, parts)`` -> node.
    """
    _NODES[cls] = to_dict, from_dict
    tell_flax()


def tell_flax() -> None:
    """Registers what is not yet registered; nothing without Flax in the process."""
    flax = sys.modules.get("flax.serialization")  # looked up, not imported
    if flax is None or not hasattr(flax, "register_serialization_state"):
        return
    nodes = dict(_NODES)
    _NODES.clear()
    for cls, functions in nodes.items():
        flax.register_serialization_state(cls, *functions, override=True)
