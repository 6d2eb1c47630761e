"""Codecs that keep a few bits per entry."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import jax

from galore_jax.codecs.base import Codec
from galore_jax.quant.array import QuantizedArray, check_format, decode, quantize


class _Blockwise(Codec, abc.ABC):
    bits: ClassVar[int]
    block: int

    def __post_init__(self):
        object.__setattr__(self, "block", check_format(self.bits, self.block))

    def encode(self, basis: jax.Array, key: jax.Array) -> QuantizedArray:
        del key
        # A basis is long along its columns, and the entries of one column are of one size.
        return quantize(basis, bits=self.bits, block=self.block, axis=-2)

    def decode(self, stored, dtype, shape):
        del shape
        return decode(stored).astype(dtype)


@dataclasses.dataclass(frozen=True)
class int8(_Blockwise):
    """Stores a basis in 8-bit codes, in blocks along its columns: a quarter of the bytes of fp32.

    Args:
      block: Entries per block.

    Raises:
      ValueError: `block` below one.

    Example:
      >>> import galore_jax as gj
      >>> tx = gj.galore_adamw(1e-2, codec=gj.codecs.int8())
    """

    block: int = 256
    bits = 8


@dataclasses.dataclass(frozen=True)
class int4(_Blockwise):
    """Stores a basis in 4-bit codes, two a byte, in blocks along its columns (Q-GaLore).

    The decoded basis both projects and lifts. Its columns are orthonormal to about 0.05 only.

    Args:
      block: Entries per block.

    Raises:
      ValueError: `block` below one.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> tx = gj.galore_adamw(1e-2, rank=8, codec=gj.codecs.int4())
      >>> tx.init({"w": jnp.ones((64, 128))})[0].projectors["w"].codes.shape
      (32, 8)

    References:
      Zhang et al., "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank
      Gradients", 2024 (https://arxiv.org/abs/2407.08296).
    """

    block: int = 256
    bits = 4
