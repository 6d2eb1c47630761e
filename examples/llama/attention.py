"""Causal attention: which kernel computes it, and how many scores exist at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import backend

KERNELS = ("auto", "xla", "cudnn")
CUDNN_MAX_HEAD_DIM = 128  # what every CUDA generation's flash kernel takes


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *, kernel: str = "auto", chunk: int | None = None
) -> jax.Array:
    """Causal attention [B, S, heads, head_dim].

    JAX does not choose a kernel by itself, so ``"auto"`` does: cuDNN's flash attention on CUDA in
    16 bits with a head dimension that it supports, XLA otherwise. It looks at the default backend:
    to compile for another device, name the kernel.

    Args:
        q: queries.
        k: keys.
        v: values.
        kernel: one of `KERNELS`.
        chunk: with XLA's kernel the queries whose scores [B, heads, chunk, S] exist at once, in the
            backward pass as well; None for all. The flash kernel never has scores.

    Raises:
        ValueError: the pieces do not make up the sequence.
    """
    if kernel == "auto":
        kernel = "cudnn" if _is_cuda() and has_flash_kernel(q.dtype, q.shape[-1]) else "xla"
    if kernel == "xla" and chunk is not None and chunk < q.shape[1]:
        return _in_pieces(q, k, v, chunk)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=kernel)


def _in_pieces(q: jax.Array, k: jax.Array, v: jax.Array, chunk: int) -> jax.Array:
    batch, length, *head = q.shape
    if length % chunk:
        raise ValueError(f"attention_chunk {chunk} does not divide the sequence length {length}")
    positions = jnp.arange(length)

    @jax.checkpoint
    def piece(_: None, xs: tuple[jax.Array, jax.Array]) -> Any:
        q, own = xs
        seen = own[:, None] >= positions
        return None, jax.nn.dot_product_attention(q, k, v, mask=seen, implementation="xla")

    pieces = q.reshape(batch, length // chunk, chunk, *head).swapaxes(0, 1)
    _, mixed = jax.lax.scan(piece, None, (pieces, positions.reshape(-1, chunk)))
    return mixed.swapaxes(0, 1).reshape(q.shape)


def has_flash_kernel(dtype: Any, head_dim: int) -> bool:
    """Whether cuDNN's flash attention takes such queries."""
    in_16_bits = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return in_16_bits and head_dim % 8 == 0 and head_dim <= CUDNN_MAX_HEAD_DIM


def _is_cuda() -> bool:
    # "gpu" is also the platform of ROCm, which has no cuDNN.
    return "cuda" in backend.get_backend().platform_version.lower()
