"""Storage formats of a basis."""

from galore_jax.codecs.base import Codec
from galore_jax.codecs.blockwise import int4, int8
from galore_jax.codecs.dense import cast, identity

__all__ = ["Codec", "cast", "identity", "int4", "int8"]
