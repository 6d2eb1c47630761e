"""Adafactor's second moment, against optax's on the one case that both can do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj


def gradients(*shape, steps=6, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(steps, *shape)) * (1 + 9 * rng.uniform(size=shape))).astype(np.float32)


def run(tx, stream, params=None):
    state, update = tx.init(stream[0] if params is None else params), jax.jit(tx.update)
    for gradient in stream:
        updates, state = update(gradient, state, params)
        yield np.asarray(updates)


def optaxs(decay_rate=0.8, epsilon=1e-30, clipping_threshold=1.0, factored=True):
    clip = (
        optax.identity()
        if clipping_threshold is None
        else optax.clip_by_block_rms(clipping_threshold)
    )
    rms = optax.scale_by_factored_rms(
        factored=factored, decay_rate=decay_rate, min_dim_size_to_factor=1, epsilon=epsilon
    )
    return optax.chain(rms, clip)


OPTIONS = [
    {},
    {"clipping_threshold": None},
    {"clipping_threshold": 0.3},
    {"decay_rate": 0.5, "epsilon": 1e-3},
]


@pytest.mark.standard_promotion
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (9, 1)], ids=str)
def test_a_matrix_is_optaxs(shape, options):
    stream = gradients(*shape)
    theirs = run(optaxs(**options), stream, jnp.zeros(shape))
    for ours, expected in zip(
        run(gj.scale_by_factored_rms(**options), stream), theirs, strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_vector_keeps_a_full_average_like_optaxs(options):
    stream = gradients(11)
    theirs = run(optaxs(factored=False, **options), stream, jnp.zeros(11))
    for ours, expected in zip(
        run(gj.scale_by_factored_rms(**options), stream), theirs, strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS[2:], ids=str)
@pytest.mark.parametrize("batch", [(3,), (2, 2)], ids=str)
def test_a_stack_is_its_matrices(batch, options):
    stream = gradients(*batch, 8, 5)
    tx = gj.scale_by_factored_rms(**options)
    whole = np.stack(list(run(tx, stream)))
    for index in np.ndindex(*batch):
        alone = np.stack(list(run(tx, stream[(slice(None), *index)])))
        np.testing.assert_allclose(whole[(slice(None), *index)], alone, rtol=1e-5, atol=1e-7)


def test_the_state_is_factored():
    params = {"stack": jnp.ones((3, 8, 5)), "v": jnp.ones((7,)), "s": jnp.ones(()), "none": None}
    state = gj.scale_by_factored_rms().init(params)
    shapes = jax.tree.map(jnp.shape, state, is_leaf=lambda x: isinstance(x, jax.Array))
    assert shapes.rows == {"stack": (3, 8), "v": (7,), "s": (), "none": None}
    assert shapes.columns == {"stack": (3, 5), "v": (), "s": (), "none": None}
    updates, new = jax.jit(gj.scale_by_factored_rms().update)(params, state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    assert updates["none"] is None and new.count == 1


def test_the_first_step_of_a_rank_one_gradient_has_entries_of_one():
    gradient = np.outer([1, -2, 3], [0.1, 5, -7]).astype(np.float32)
    (update,) = run(gj.scale_by_factored_rms(clipping_threshold=None), gradient[None])
    np.testing.assert_allclose(update, np.sign(gradient), rtol=1e-5)


def test_each_matrix_is_clipped_by_itself():
    stream = np.ones((2, 2, 6, 4), np.float32)
    stream[1, 0] *= 100  # the second gradient of the first matrix is a spike
    first, second = list(run(gj.scale_by_factored_rms(clipping_threshold=0.5), stream))[1]
    assert np.sqrt(np.mean(first**2)) == pytest.approx(0.5, rel=1e-4)
    assert np.sqrt(np.mean(second**2)) == pytest.approx(0.5, rel=1e-4)
    loose = list(run(gj.scale_by_factored_rms(clipping_threshold=1.0), stream))[1]
    assert np.sqrt(np.mean(loose[1] ** 2)) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("shape", [(6, 4), (5,), ()], ids=str)
def test_zero_gradients_give_zero(shape):
    for update in run(gj.scale_by_factored_rms(), np.zeros((3, *shape), np.float32)):
        np.testing.assert_array_equal(update, np.zeros(shape))


def test_serves_as_an_inner_for_stacks():
    tx = gj.low_rank_projection(gj.scale_by_factored_rms(), 2, axes=gj.MatrixAxes(), refresh=2)
    stream = gradients(3, 8, 5)
    whole = np.stack(list(run(tx, stream)))
    assert np.all(np.isfinite(whole)) and np.abs(whole).max() < 10
