"""The contract of a codec."""

from __future__ import annotations

import abc
from typing import Any

import jax


class Codec(abc.ABC):
    """Stores an array in fewer bytes. Codecs are frozen dataclasses.

    Laws: batch axes stay leading in every component of the stored form, so that a slice or a
    sharding of the batch applies to each part; `encode(decode(s)) == s` bit for bit; no component
    has size zero. The basis that projects and lifts is always the decoded one.
    """

    @abc.abstractmethod
    def encode(self, array: jax.Array) -> Any:
        """Array ``[*batch, n, k]`` -> stored form (an array or a pytree of arrays)."""

    @abc.abstractmethod
    def decode(self, stored: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Stored form -> array ``[*batch, n, k]`` of `dtype`."""
