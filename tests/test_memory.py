"""Bytes by role: of states that exist, and of those that would."""

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_jax as gj

PARAMS = {
    "embed": jnp.ones((100, 64)),
    "up": jnp.ones((64, 256), jnp.bfloat16),
    "norm": jnp.ones((64,)),
}
OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "galore": gj.galore_adamw(1e-2, rank=8),
    "8-bit": gj.galore_adamw8bit(1e-2, rank=8),
    "q-galore": gj.q_galore_adamw8bit(1e-2, rank=8),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), gj.galore_lion(1e-3, rank=8)),
}


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("quantized", [False, True], ids=["full", "int8"])
@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_estimate_is_what_the_state_takes(tx, quantized):
    params = gj.quant.quantize_params(PARAMS) if quantized else PARAMS
    state = tx.init(gj.quant.dequantize_params(params))
    memory = gj.memory.estimate(tx, params)
    assert memory == gj.memory.report(state, params)
    assert memory.weights == nbytes(params)
    assert memory.state == nbytes(state)
    assert memory.total == nbytes((params, state))


def test_roles():
    memory = gj.memory.estimate(OPTIMIZERS["galore"], PARAMS)
    assert memory.projectors == 64 * 8 * 4 + 2 * 4  # and a scalar for each of the other leaves
    assert memory.inner_state == 2 * 4 * (100 * 64 + 256 * 8 + 64) + 4


def test_nothing_is_allocated():
    shapes = {"w": jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)}
    assert gj.memory.estimate(gj.galore_adamw(1e-2, rank=8), shapes).weights == 2**42


def test_it_prints():
    text = str(gj.memory.estimate(OPTIMIZERS["q-galore"], PARAMS))
    assert [line.split()[0] for line in text.splitlines()] == [
        "weights",
        "projectors",
        "inner",
        "refresh",
        "other",
        "total",
    ]
