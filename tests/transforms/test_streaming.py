"""Large stacks are updated in pieces: the same numbers, without a decoded copy of the state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj
from galore_jax.transforms import streaming
from galore_jax.transport import moments

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction

SHAPES = {"a": (6, 24, 40), "b": (96, 20), "c": (7,), "d": (), "e": (10, 4, 8, 8)}
STACKS = {"a", "e"}
MASK = {"a": True, "b": False, "c": True, "d": False, "e": False}
NORM = optax.clip_by_global_norm(1.0)


class Speed(NamedTuple):
    """The state of a transformation that nobody knows, until it is registered."""

    speed: optax.Updates


def decayed_momentum():
    """Reads parameters and an extra argument."""

    def update(updates, state, params, *, rate=1.0):
        speed = jax.tree.map(lambda s, g, p: 0.9 * s + g + 0.1 * p, state.speed, updates, params)
        return jax.tree.map(lambda s: s * rate, speed), Speed(speed)

    return optax.GradientTransformationExtraArgs(
        lambda params: Speed(jax.tree.map(jnp.zeros_like, params)), update
    )


@pytest.fixture(params=[True, False], ids=["declared", "undeclared"])
def declared(request, monkeypatch):
    monkeypatch.setattr(moments, "_REGISTRY", dict(moments._REGISTRY))
    gj.transport.register_moment(Speed, first="speed", elementwise=request.param)
    return request.param


def tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def quantized(inner):
    return gj.quantized_state(inner, min_size=64, block=32)


def run(make, monkeypatch, piece, params=None, dtype=jnp.float32, **extra_args):
    """Updates and states of some steps, and the program of one."""
    monkeypatch.setattr(streaming, "PIECE", piece)
    tx = optax.with_extra_args_support(make(quantized))
    params = tree(0, dtype) if params is None else params
    state, results = tx.init(params), []
    update = jax.jit(lambda *args: tx.update(*args, **extra_args))
    for step in range(3):
        updates, state = update(tree(step + 1, dtype), state, params)
        results.append((updates, state))
    return results, str(jax.make_jaxpr(update)(tree(1, dtype), state, params))


def assert_same_in_pieces(make, monkeypatch, in_pieces, **options):
    whole, program = run(make, monkeypatch, 2**30, **options)
    assert "while" not in program and "scan" not in program
    cut, program = run(make, monkeypatch, 1000, **options)
    assert ("while" in program or "scan" in program) == in_pieces
    assert jax.tree.structure(whole) == jax.tree.structure(cut)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if a.dtype == jnp.uint8:  # a last digit may tip a code
            assert np.max(np.abs(np.asarray(a, int) - np.asarray(b, int))) <= 1
        elif a.dtype == jnp.bfloat16:  # or a last digit
            np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), rtol=1e-2)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Every transformation of optax's with a state that is declared elementwise, and wrappers of ours.
IN_PIECES = {
    "adam": lambda q: q(optax.scale_by_adam()),
    "nadam": lambda q: q(optax.scale_by_adam(nesterov=True, mu_dtype=jnp.bfloat16)),
    "adamax": lambda q: q(optax.scale_by_adamax()),
    "yogi": lambda q: q(optax.scale_by_yogi()),
    "radam": lambda q: q(optax.scale_by_radam()),
    "adopt": lambda q: q(optax.contrib.scale_by_adopt()),
    "amsgrad": lambda q: q(optax.scale_by_amsgrad()),
    "lion": lambda q: q(optax.scale_by_lion()),
    "momentum": lambda q: q(optax.trace(0.9, nesterov=True)),
    "ema": lambda q: q(optax.ema(0.9)),
    "rms": lambda q: q(optax.scale_by_rms()),
    "rss": lambda q: q(optax.scale_by_rss()),
    "in a chain": lambda q: optax.chain(NORM, q(optax.trace(0.9)), optax.scale_by_trust_ratio()),
    "in a mask": lambda q: optax.masked(q(optax.scale_by_adam()), MASK),
    "in a partition": lambda q: optax.partition(
        {True: q(optax.scale_by_adam()), False: q(optax.trace(0.9))}, MASK
    ),
    "injected": lambda q: optax.inject_hyperparams(lambda b1: q(optax.scale_by_adam(b1)))(b1=0.8),
}
# A state does not tell what these do to a leaf, or to all of them.
WHOLE = {
    "global norm": lambda q: q(optax.chain(NORM, optax.scale_by_adam())),
    "block rms": lambda q: q(optax.chain(optax.clip_by_block_rms(1e-2), optax.trace(0.9))),
    "norm of the update": lambda q: q(
        optax.chain(optax.trace(0.9), optax.normalize_by_update_norm())
    ),
    "trust ratio": lambda q: q(optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio())),
    "mean": lambda q: q(optax.chain(optax.trace(0.9), optax.centralize())),
    "noise": lambda q: q(optax.chain(optax.trace(0.9), optax.add_noise(0.1, 0.5, 0))),
    "mask inside": lambda q: q(optax.masked(optax.chain(NORM, optax.scale_by_adam()), MASK)),
    "named chain": lambda q: q(optax.named_chain(("norm", NORM), ("adam", optax.scale_by_adam()))),
    "a guard": lambda q: q(optax.apply_if_finite(optax.scale_by_adam(), 3)),
}


@pytest.mark.parametrize("name", [*IN_PIECES, *WHOLE])
def test_the_numbers_are_those_of_the_whole(name, monkeypatch):
    """Two programs, and one only for what is updated as a whole: it has no loop."""
    make = (IN_PIECES | WHOLE)[name]
    assert_same_in_pieces(make, monkeypatch, name in IN_PIECES)


def test_of_bf16_gradients_too(monkeypatch):
    assert_same_in_pieces(IN_PIECES["adam"], monkeypatch, True, dtype=jnp.bfloat16)


@pytest.mark.parametrize("few_bits", [False, True], ids=["fp32", "INT8"])
def test_pieces_read_their_parameters_and_scalars(few_bits, declared, monkeypatch):
    params = gj.quant.quantize_params(tree(0), targets="a|e", block=16) if few_bits else tree(0)
    for rate, scalar in ((jnp.float32(3.0), True), (2.0, True), (jnp.ones((1,)), False)):
        assert_same_in_pieces(
            lambda q: q(decayed_momentum()),
            monkeypatch,
            declared and scalar,
            params=params,
            rate=rate,
        )


def test_calls_outside_of_jit_compile_once(monkeypatch):
    monkeypatch.setattr(streaming, "PIECE", 1000)
    tx, params, events = quantized(optax.scale_by_adam()), tree(0), []

    def listen(event, duration, **_):
        del duration
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        state = tx.init(params)
        _, state = tx.update(tree(1), state, params)
        assert any("compile" in event for event in events)
        events.clear()
        for step in range(2, 5):
            _, state = tx.update(tree(step), state, params)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not events and int(state.count) == 4


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
