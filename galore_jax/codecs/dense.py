"""Codecs that keep one number per entry."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from galore_jax.codecs.base import Codec


@dataclasses.dataclass(frozen=True)
class identity(Codec):
    """Stores the array as it is: fp32 (fp64 for fp64 leaves).

    Example:
      >>> import galore_jax as gj
      >>> gj.codecs.identity()
      identity()
    """

    def encode(self, array):
        return array

    def decode(self, stored, dtype):
        return stored.astype(dtype)


@dataclasses.dataclass(frozen=True)
class cast(Codec):
    """Stores the array in another floating dtype; bf16 halves the projector's bytes.

    A bf16 basis is orthonormal to about 1e-2 only.

    Args:
      dtype: A floating dtype, or its name.

    Raises:
      TypeError: `dtype` is not a floating dtype.

    Example:
      >>> import galore_jax as gj
      >>> gj.codecs.cast("bfloat16")
      cast(dtype='bfloat16')
    """

    dtype: jax.typing.DTypeLike

    def __post_init__(self):
        try:
            dtype = jnp.dtype(self.dtype)
        except TypeError as error:
            raise TypeError(f"`cast` needs a floating dtype, got {self.dtype!r}.") from error
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"`cast` needs a floating dtype, got {dtype.name}.")
        object.__setattr__(self, "dtype", dtype.name)  # one spelling: equal casts compare equal

    def encode(self, array):
        return array.astype(self.dtype)

    def decode(self, stored, dtype):
        return stored.astype(dtype)
