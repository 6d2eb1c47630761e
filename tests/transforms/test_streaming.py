"""Large leaves are updated in pieces: the same numbers, without a decoded copy of the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj
from galore_jax.transforms import streaming
from galore_jax.transforms.elementwise import is_elementwise

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction

ENTRYWISE = {
    "adam": optax.scale_by_adam(),
    "amsgrad": optax.scale_by_amsgrad(),
    "lion": optax.scale_by_lion(),
    "momentum": optax.trace(0.9, nesterov=True),
    "rms": optax.scale_by_rms(),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "clipped": optax.chain(optax.clip(0.1), optax.ema(0.9)),
    "masked": optax.masked(optax.scale_by_adam(), {"a": True, "b": False, "c": True}),
}
COUPLED = {
    "global norm": optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9)),
    "norm of a leaf": optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio()),
    "noise": optax.chain(optax.trace(0.9), optax.add_noise(0.1, 0.5, 0)),
}


def tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (6, 24, 40), "b": (96, 20), "c": (7,)}
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }


def run(inner, monkeypatch, piece, dtype=jnp.float32):
    monkeypatch.setattr(streaming, "PIECE", piece)
    tx = gj.quantized_state(inner, min_size=64, block=32)
    params = jax.tree.map(lambda x: x.astype(dtype), tree(0))
    state = tx.init(params)
    # A new function: the cache knows nothing of PIECE.
    update = jax.jit(lambda *args: tx.update(*args))
    for step in range(3):
        gradients = jax.tree.map(lambda x: x.astype(dtype), tree(step + 1))
        updates, state = update(gradients, state, params)
    return updates, state, str(jax.make_jaxpr(tx.update)(gradients, state, params))


@pytest.mark.parametrize("inner", ENTRYWISE.values(), ids=ENTRYWISE)
def test_pieces_give_the_same_numbers(inner, monkeypatch):
    updates, state, _ = run(inner, monkeypatch, 2**30)
    in_pieces, piecewise_state, program = run(inner, monkeypatch, 1000)
    assert "while" in program or "scan" in program
    assert jax.tree.structure(state) == jax.tree.structure(piecewise_state)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(in_pieces), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(piecewise_state), strict=True):
        if a.dtype == jnp.uint8:  # a last digit may tip a code
            assert np.max(np.abs(np.asarray(a, int) - np.asarray(b, int))) <= 1
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inner", COUPLED.values(), ids=COUPLED)
def test_what_looks_at_a_whole_leaf_is_not_cut(inner, monkeypatch):
    program = run(inner, monkeypatch, 1000)[2]
    assert "while" not in program and "scan" not in program


def test_bf16_gradients_keep_their_dtype_in_pieces(monkeypatch):
    updates = run(optax.scale_by_adam(), monkeypatch, 1000, jnp.bfloat16)[0]
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


def test_temporaries_stay_below_one_decoded_moment():
    """Of a stack whose moments would take 100 MB each in fp32."""
    params = {"w": jax.ShapeDtypeStruct((24, 1024, 1024), jnp.float32)}
    tx = gj.scale_by_adam8bit()
    state = jax.eval_shape(tx.init, params)
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    # Without it the CPU backend copies what a loop updates in place; GPUs do not need it.
    in_place = {"xla_cpu_copy_insertion_use_region_analysis": True}
    memory = update.lower(params, state).compile(in_place).memory_analysis()
    assert memory.temp_size_in_bytes < 24 * 1024 * 1024 * 4


@pytest.mark.parametrize(
    "shape, piece",
    [
        ((7,), None),
        ((1024, 2048), None),  # 2**21 entries
        ((1024, 4096), (0, 512)),  # blocks along the last axis: cut the rows
        ((32000, 1024), (1, 64)),  # blocks along the first: cut the columns
        ((24, 1024, 2048), (0, 1)),
        ((24, 1024, 256), (0, 8)),
        ((2, 4096, 4096), (0, 1)),
    ],
)
def test_pieces(shape, piece):
    assert streaming.piece_of(shape) == piece


def elementwise(fn, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    owners = [i if shape else None for i, shape in enumerate(shapes)]
    return is_elementwise(fn, args, owners, expected=[0])


@pytest.mark.parametrize(
    "fn, expected",
    [
        (lambda x, s: x * s + jnp.sqrt(jnp.abs(x)), True),
        (lambda x, s: jnp.where(x > s, jax.nn.relu(x), -x), True),
        (lambda x, s: x + jnp.full(x.shape, 2.0) * s, True),
        (lambda x, s: x / jnp.linalg.norm(x), False),
        (lambda x, s: x[::-1], False),
        (lambda x, s: jnp.cumsum(x, 0), False),
        (lambda x, s: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), False),
        (lambda x, s: x + np.arange(12, dtype=np.float32).reshape(3, 4), False),
        (lambda x, s: x * jax.random.normal(jax.random.key(0), x.shape), False),
    ],
)
def test_elementwise(fn, expected):
    assert elementwise(fn, (3, 4), ()) == expected


def test_leaves_that_meet_are_not_elementwise():
    assert not elementwise(lambda x, y: x + y, (3, 4), (3, 4))
    assert elementwise(lambda x, y: 2 * x, (3, 4), (3, 4))


def test_a_scalar_that_depends_on_an_array_is_not_elementwise():
    args = [jax.ShapeDtypeStruct((3,), jnp.float32)]
    assert not is_elementwise(jnp.sum, args, [0], expected=[None])
