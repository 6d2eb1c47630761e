"""Which attention kernel is taken, and attention in pieces."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama import attention, model, objective
from examples.llama.presets import PRESETS

HEADS = 2, 8  # heads, head_dim


def queries_keys_values(length, *, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((3, length, *HEADS)), dtype) for _ in range(3)]


@pytest.mark.parametrize(
    ("cuda", "dtype", "size", "kernel", "want"),
    [
        (True, "bfloat16", 64, "auto", "cudnn"),
        (True, "bfloat16", 12, "auto", "xla"),  # no multiple of 8
        (True, "bfloat16", 256, "auto", "xla"),
        (True, "float32", 64, "auto", "xla"),
        (False, "bfloat16", 64, "auto", "xla"),
        (False, "float32", 64, "cudnn", "cudnn"),
        (True, "bfloat16", 64, "xla", "xla"),
    ],
)
@pytest.mark.parametrize("chunk", [None, 2])
def test_the_kernel_fits_device_and_dtype(monkeypatch, cuda, dtype, size, kernel, want, chunk):
    taken = []

    def product(q, k, v, *, implementation, is_causal=False, mask=None):
        taken.append((implementation, is_causal or mask is not None))
        return q

    monkeypatch.setattr(attention, "_is_cuda", lambda: cuda)
    monkeypatch.setattr(jax.nn, "dot_product_attention", product)
    q = jnp.zeros((1, 4, 1, size), dtype)
    attention.attend(q, q, q, kernel=kernel, chunk=chunk)
    assert taken == [(want, True)]


def test_the_platform_is_detected():
    assert attention._is_cuda() == any("cuda" in str(device).lower() for device in jax.devices())


@pytest.mark.parametrize("chunk", [1, 4, 6])
def test_pieces_make_up_the_whole(chunk):
    """Values and gradients; the softmax is one of float32, whatever the dtype."""

    def mixed(chunk):
        def loss(arrays):
            out = attention.attend(*arrays, kernel="xla", chunk=chunk)
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(loss, has_aux=True)(queries_keys_values(12, dtype=np.float64))

    with jax.enable_x64(True):
        chex.assert_trees_all_close(mixed(chunk), mixed(None), rtol=0, atol=5e-7)


def test_scores_of_one_piece_exist_at_a_time():
    length, chunk = 32, 4

    def gradient(chunk):
        def loss(arrays):
            return jnp.sum(attention.attend(*arrays, kernel="xla", chunk=chunk) ** 2)

        arrays = queries_keys_values(length)
        return jax.jit(jax.grad(loss)).lower(arrays).compile().as_text()

    square, slab = f"{length},{length}]", f"{chunk},{length}]"
    assert square in gradient(None)
    assert square not in gradient(chunk) and slab in gradient(chunk)


def test_the_model_computes_the_same_in_pieces():
    config = dataclasses.replace(PRESETS["tiny"].model, num_layers=2, max_seq_len=16)
    params = model.init(config, jax.random.key(0))
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    batch = {"inputs": tokens, "targets": tokens}
    pieces = dataclasses.replace(config, attention_chunk=4, remat=True)
    want, got = (
        jax.value_and_grad(lambda p, c=c: objective.loss(c, p, batch))(params)
        for c in (config, pieces)
    )
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)


def test_pieces_that_do_not_make_up_the_sequence_are_refused():
    with pytest.raises(ValueError, match="attention_chunk 5 does not divide"):
        attention.attend(*queries_keys_values(12), chunk=5)
