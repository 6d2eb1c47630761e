"""The contract of a codec."""

from __future__ import annotations

import abc
from typing import Any

import jax


class Codec(abc.ABC):
    """Stores a basis in fewer bytes. Codecs are frozen dataclasses.

    Laws: batch axes stay leading in every component of the stored form, so that a slice or a
    sharding of the batch applies to each part; ``encode(decode(s), key) == s`` bit for bit; no
    component has size zero. The basis that projects and lifts is always the decoded one.
    """

    @abc.abstractmethod
    def encode(self, basis: jax.Array, key: jax.Array) -> Any:
        """Stored form of a basis.

        Args:
          basis: ``[*batch, projected, rank]``.
          key: ``uint32[*batch, 2]``, the key that its projector had: a codec may store that in the
            place of a basis which nothing else went into.

        Returns:
          An array or a pytree of arrays, batch axes leading.
        """

    @abc.abstractmethod
    def decode(self, stored: Any, dtype: jax.typing.DTypeLike, shape: tuple[int, ...]) -> jax.Array:
        """The basis.

        Args:
          stored: Its stored form.
          dtype: Floating dtype of the result.
          shape: ``(*batch, projected, rank)``, which the stored form may not show.

        Returns:
          An array of that shape and dtype.
        """
