"""Codecs that keep one number per entry."""

from __future__ import annotations

import dataclasses

import jax

from galore_jax.checks import check_floating
from galore_jax.codecs.base import Codec


@dataclasses.dataclass(frozen=True)
class identity(Codec):
    """Stores the array as it is: fp32 (fp64 for fp64 leaves).

    Example:
      >>> import galore_jax as gj
      >>> gj.codecs.identity()
      identity()
    """

    def encode(self, basis, key):
        del key
        return basis

    def decode(self, stored, dtype, shape):
        del shape
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
        # One spelling: equal casts compare equal.
        object.__setattr__(self, "dtype", check_floating("dtype", self.dtype).name)

    def encode(self, basis, key):
        del key
        return basis.astype(self.dtype)

    def decode(self, stored, dtype, shape):
        del shape
        return stored.astype(dtype)
