"""The optimizers of the Llama example: each trains, and does what its options say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj
from examples.llama import model, optimizers
from examples.llama.optimizers import OptimizerOptions

NAMES = (
    "galore_adamw",
    "galore_adafactor",
    "galore_lion",
    "galore_sgd",
    "adamw",
    "adafactor",
    "optax_galore",
)
RATE, DECAY = 0.1, 0.5
LLAMA = model.LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    max_seq_len=16,
)


def resolved(name: str, **options) -> OptimizerOptions:
    return optimizers.resolve(OptimizerOptions(name, **options), rank=4, gap=2, scale=0.25)


def make(name: str, *, rate: float = 0.1, clip: float = 0.0, **options):
    return optimizers.make_optimizer(
        resolved(name, **options), optax.constant_schedule(rate), clip=clip, seed=0
    )


@pytest.fixture(scope="module")
def params():
    return model.init(LLAMA, jax.random.key(0))


@pytest.fixture(scope="module")
def grads(params):
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten(
        jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)
    )


def named(tree):
    return {
        optimizers.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@functools.cache
def compiled(name: str):
    """The optimizer with weight decay, compiled once for all tests."""
    tx = make(name, rate=RATE, clip=1.0, weight_decay=DECAY)
    return tx.init, jax.jit(tx.update)


def decayed(params):
    """What weight decay adds to the updates: it spares the norm scales."""
    return {
        path: jnp.zeros_like(x) if path.endswith("scale") else -RATE * DECAY * x
        for path, x in named(params).items()
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.sampled(2)
def test_every_leaf_is_updated_and_the_state_keeps_its_layout(name, params, grads):
    init, update = compiled(name)
    state = init(params)
    updates, new_state = update(grads, state, params)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    for path, u in named(updates).items():
        assert u.shape == named(params)[path].shape
        assert np.isfinite(u).all() and np.any(u != 0), path


@pytest.mark.parametrize("name", [n for n in NAMES if "galore" in n])
def test_exactly_the_block_matrices_have_low_rank_updates(name, params, grads):
    init, update = compiled(name)
    updates, _ = update(grads, init(params), params)
    for path, u in named(updates).items():
        if path.endswith("kernel"):
            rank = np.linalg.matrix_rank(np.asarray(u - decayed(params)[path]), rtol=1e-4)
            assert (rank == 4).all() if path.startswith("blocks/") else rank > 4, path


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_spares_the_norm_scales(name, params):
    init, update = compiled(name)
    updates, _ = update(jax.tree.map(jnp.zeros_like, params), init(params), params)
    for path, u in named(updates).items():
        np.testing.assert_allclose(u, decayed(params)[path], rtol=1e-6, err_msg=path)


def test_the_library_projects_what_the_example_calls_a_block_matrix(params):
    text = str(gj.describe(gj.galore_adamw(0.1, 4, axes=gj.MatrixAxes(-2, -1)), params))
    for path in named(params):
        assert path in text
    adam = jax.eval_shape(make("galore_adamw").init, params).inner_state[1][0].inner_state
    for path, moment in named(adam.mu).items():
        assert (moment.shape[-1] == 4) == optimizers.is_block_matrix(path), path


def test_optax_galore_agrees_with_the_library_on_the_long_side(params, grads):
    same = {"side": "long", "projector": "svd", "transport": "keep"}
    ours = make("galore_adamw", rate=RATE, clip=1.0, weight_decay=DECAY, **same)
    updates, _ = jax.jit(ours.update)(grads, ours.init(params), params)
    init, update = compiled("optax_galore")
    theirs, _ = update(grads, init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), updates, theirs)


def test_matrix_lr_scale_slows_down_the_block_matrices_alone(params, grads):
    plain, split = make("adamw"), make("adamw", matrix_lr_scale=0.25)
    full, _ = jax.jit(plain.update)(grads, plain.init(params), params)
    scaled, _ = jax.jit(split.update)(grads, split.init(params), params)
    for path, update in named(full).items():
        factor = 0.25 if optimizers.is_block_matrix(path) else 1.0
        np.testing.assert_allclose(named(scaled)[path], factor * update, rtol=1e-6)


def test_options_without_effect_are_refused_by_name():
    with pytest.raises(ValueError, match=r"--gap, --rank: no effect on --optimizer adamw"):
        resolved("adamw", rank=3, gap=5)
    with pytest.raises(ValueError, match=r"--matrix-lr-scale: no effect on --optimizer galore_"):
        resolved("galore_adamw", matrix_lr_scale=0.25)
    with pytest.raises(ValueError, match="whole number"):
        make("optax_galore", rank=0.25)


@pytest.mark.parametrize("name", NAMES)
def test_resolving_leaves_no_option_in_force_open(name):
    options = resolved(name)
    assert optimizers.resolve(options, rank=9, gap=9, scale=9.0) == options
    assert name in optimizers.describe(options) and "None" not in optimizers.describe(options)


def test_the_state_has_one_layout_whatever_can_be_switched_on_resume(params):
    plain = jax.eval_shape(make("galore_adamw").init, params)
    for changed in (
        make("galore_adamw", clip=1.0),
        make("galore_adamw", rate=0.2, gap=7, scale=1.0, weight_decay=0.1),
        make("galore_adamw", transport="keep", projector="svd"),
    ):
        assert named(plain) == named(jax.eval_shape(changed.init, params))


def test_schedule_is_linear_then_cosine_to_a_tenth():
    rate = optimizers.make_schedule(learning_rate=2.0, steps=100, warmup=10)
    expected = {0: 0.0, 5: 1.0, 10: 2.0, 55: 1.1, 100: 0.2}
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-6, err_msg=str(step))
    cosine = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * 20 / 90))
    np.testing.assert_allclose(rate(30), 2.0 * cosine, rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_non_finite_gradient_changes_nothing_and_is_counted(bad, params, grads):
    init, update = compiled("galore_adamw")
    poisoned = jax.tree.map(lambda g: g, grads)
    poisoned["norm"]["scale"] = grads["norm"]["scale"].at[0].set(bad)
    _, state = update(grads, init(params), params)
    updates, after = update(poisoned, state, params)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
    assert (int(after.notfinite_count), int(after.total_notfinite)) == (1, 1)
    _, recovered = update(grads, after, params)
    assert (int(recovered.notfinite_count), int(recovered.total_notfinite)) == (0, 1)
