"""Large leaves are updated in pieces: the same numbers, without a decoded copy of the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj
from galore_jax.transforms import streaming
from galore_jax.transforms.elementwise import entrywise

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction

ENTRYWISE = {
    "adam": optax.scale_by_adam(),
    "amsgrad": optax.scale_by_amsgrad(),
    "lion": optax.scale_by_lion(),
    "momentum": optax.trace(0.9, nesterov=True),
    "rms": optax.scale_by_rms(),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "clipped": optax.chain(optax.clip(0.1), optax.ema(0.9)),
    "masked": optax.masked(optax.scale_by_adam(), {"a": True, "b": False, "c": True, "d": False}),
}
COUPLED = {
    "global norm": optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9)),
    "norm of a leaf": optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio()),
    "noise": optax.chain(optax.trace(0.9), optax.add_noise(0.1, 0.5, 0)),
}


def tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (6, 24, 40), "b": (96, 20), "c": (7,), "d": ()}
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
        ((32000, 4096), None),  # no stack
        ((2, 1024, 1024), None),  # 2**21 entries
        ((24, 1024, 2048), 1),
        ((24, 1024, 256), 8),
        ((25, 1024, 256), 5),
        ((2, 4096, 4096), 1),
    ],
)
def test_pieces(shape, piece):
    assert streaming.piece_of(shape) == piece


def program(fn, *shapes, outputs=(0,)):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    owners = [i if shape else None for i, shape in enumerate(shapes)]
    return entrywise(fn, args, owners, outputs)


@pytest.mark.parametrize(
    "fn, expected",
    [
        (lambda x, s: x * s + jnp.sqrt(jnp.abs(x)), True),
        (lambda x, s: jnp.where(x > s, jax.nn.relu(x), -x), True),
        (lambda x, s: x + jnp.full(x.shape, 2.0) * s, True),
        (lambda x, s: jnp.full(x.shape, 2.0) * s, True),
        (lambda x, s: x / x.size, True),  # the size of the whole, not of a piece
        (lambda x, s: x / jnp.linalg.norm(x), False),
        (lambda x, s: x[::-1], False),
        (lambda x, s: jnp.cumsum(x, 0), False),
        (lambda x, s: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), False),
        (lambda x, s: x + np.arange(12, dtype=np.float32).reshape(3, 4), False),
        (lambda x, s: x * jax.random.normal(jax.random.key(0), x.shape), False),
    ],
)
def test_entrywise(fn, expected):
    found = program(fn, (3, 4), ())
    assert (found is not None) == expected
    if found is not None:
        x, s = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), jnp.float32(0.3)
        (piece,) = found.run(0, (1, 4), [x[1:2], s])
        np.testing.assert_allclose(piece, fn(x, s)[1:2], rtol=1e-6)


def test_leaves_that_meet_are_not_entrywise():
    assert program(lambda x, y: x + y, (3, 4), (3, 4)) is None
    assert program(lambda x, y: y, (3, 4), (3, 4)) is None  # the wrong leaf
    assert program(lambda x, y: (2 * x, -y), (3, 4), (3, 4), outputs=(0, 1)) is not None


def test_a_scalar_that_depends_on_an_array_is_not_entrywise():
    assert program(jnp.sum, (3,), outputs=(None,)) is None


def test_what_depends_on_the_size_or_the_place_of_a_leaf_stays_what_it_was(monkeypatch):
    def scale(updates, params):
        leaves, treedef = jax.tree.flatten(updates)
        return treedef.unflatten(i * x / np.sqrt(x.size) for i, x in enumerate(leaves, 1))

    inner = optax.chain(optax.trace(0.9), optax.stateless(scale))
    updates, _, _ = run(inner, monkeypatch, 2**30)
    in_pieces, _, program = run(inner, monkeypatch, 1000)
    assert "while" in program or "scan" in program
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(in_pieces), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_scalar_extra_arguments_do_not_stop_it(monkeypatch):
    monkeypatch.setattr(streaming, "PIECE", 1000)

    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda x: x * value, updates), state

    scaled = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = gj.quantized_state(optax.chain(optax.trace(0.9), scaled), min_size=64, block=32)
    state = tx.init(tree(0))
    jaxpr = str(jax.make_jaxpr(lambda g, s, v: tx.update(g, s, value=v))(tree(1), state, 3.0))
    assert "while" in jaxpr or "scan" in jaxpr
    updates, _ = tx.update(tree(1), state, value=3.0)
    np.testing.assert_allclose(updates["b"], 3 * tree(1)["b"], rtol=1e-6)


def test_a_sharded_stack_is_not_gathered():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"w": jax.ShapeDtypeStruct((8, 1024, 1024), jnp.float32)}
    spec = jax.sharding.PartitionSpec(None, "x", None)
    sharding = {"w": jax.sharding.NamedSharding(mesh, spec)}
    tx = gj.scale_by_adam8bit()
    state, states = jax.eval_shape(tx.init, params), gj.state_sharding(tx, params, sharding)
    update = jax.jit(tx.update, in_shardings=(sharding, states), out_shardings=(sharding, states))
    text = update.lower(params, state).compile().as_text()
    assert "while" in text and "all-gather" not in text
