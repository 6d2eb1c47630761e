"""Nodes of this library for `flax.serialization`, which has a registry of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

# Functions that take each type apart and put it together again, until Flax has them.
_NODES: dict[type, tuple[Callable[..., Any], Callable[..., Any]]] = {}


def register(
    cls: type,
    to_dict: Callable[[Any], dict[str, Any]],
    from_dict: Callable[[Any, dict[str, Any]], Any],
) -> None:
    """Makes a type known to Flax, as soon as Flax is there.

    Args:
      cls: The type of a pytree node.
      to_dict: Node -> its parts by name.
      from_dict: ``(node of the same kind, parts)`` -> node.
    """
    _NODES[cls] = to_dict, from_dict
    tell_flax()


def tell_flax() -> None:
    """Registers what is not yet registered; nothing without Flax in the process."""
    # Looked up, not imported. Whoever saves a state has imported it before making one, as a rule.
    flax = sys.modules.get("flax.serialization")
    if flax is None or not hasattr(flax, "register_serialization_state"):
        return
    for cls, functions in _NODES.items():
        flax.register_serialization_state(cls, *functions, override=True)
    _NODES.clear()
