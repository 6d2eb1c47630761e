"""Projected gradients in front of a lens, summed up over a window, and where they cannot go."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import SHAPES, distance, draw, loss, refreshes

import galore_jax as gj
from galore_jax.transforms.state import low_rank_states

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction

OPTIONS = {"rank": 3, "axes": gj.MatrixAxes(-2, -1), "targets": "up|down|square"}
PARAMS = draw(SHAPES)


def batch(seed):
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(11, size=(4, 8)))
    return tokens, jnp.asarray(rng.normal(size=(4, 8, 12)), jnp.float32)


def is_projected(node):
    return isinstance(node, gj.ProjectedGradient)


def test_a_clip_by_global_norm_sees_the_projected_norm():
    lens = gj.low_rank_projection(optax.identity(), refresh=3, **OPTIONS)
    clipped = optax.chain(optax.clip_by_global_norm(1e-3), lens)
    value_and_grad = jax.jit(gj.projected_value_and_grad(loss, clipped))
    plain = jax.jit(gj.projected_value_and_grad(loss, lens))
    state, free = clipped.init(PARAMS), lens.init(PARAMS)
    for seed in range(5):
        _, gradient = value_and_grad(PARAMS, state, *batch(seed))
        leaves = jax.tree.leaves(gradient, is_leaf=is_projected)
        values = [leaf.value if is_projected(leaf) else leaf for leaf in leaves]
        norm = np.sqrt(sum(np.sum(np.square(value, dtype=np.float64)) for value in values))
        np.testing.assert_allclose(optax.tree.norm(gradient), norm, rtol=1e-6)
        assert norm > 1e-2  # it is clipped
        updates, state = clipped.update(gradient, state, PARAMS)
        expected, free = lens.update(plain(PARAMS, free, *batch(seed))[1], free, PARAMS)
        assert distance(updates, optax.tree.scale(np.float32(1e-3 / norm), expected)) < 1e-5
        # The clip has left the bases as they are.
        assert (
            distance(low_rank_states(state)[0].projectors["square"], free.projectors["square"])
            < 1e-6
        )
    assert refreshes(state).max() == 2


def test_hyperparameters_that_are_injected():
    make = optax.inject_hyperparams(gj.galore_sgd, static_args=gj.STATIC_ARGS)
    tx, plain = make(learning_rate=1e-2, **OPTIONS), gj.galore_sgd(1e-2, **OPTIONS)
    _, gradient = jax.jit(gj.projected_value_and_grad(loss, tx))(PARAMS, tx.init(PARAMS), *batch(0))
    updates, state = tx.update(gradient, tx.init(PARAMS), PARAMS)
    expected, _ = plain.update(gradient, plain.init(PARAMS), PARAMS)
    assert distance(updates, expected) < 1e-6 and state.hyperparams["learning_rate"] == 1e-2


def test_a_step_that_is_not_finite_is_skipped():
    """`optax.apply_if_finite` would return the gradient itself; this is the way."""
    tx = gj.galore_adamw(1e-2, **OPTIONS)
    value_and_grad = gj.projected_value_and_grad(loss, tx)

    @jax.jit
    def step(state, *batch):
        _, gradient = value_and_grad(PARAMS, state, *batch)
        return jax.lax.cond(
            jnp.isfinite(optax.tree.norm(gradient)),
            lambda: tx.update(gradient, state, PARAMS),
            lambda: (jax.tree.map(jnp.zeros_like, PARAMS), state),
        )

    tokens, target = batch(0)
    start = tx.init(PARAMS)
    updates, state = step(start, tokens, target.at[1, 2, 3].set(jnp.nan))
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(one, other)
    updates, state = step(state, tokens, target)
    assert all(np.any(u) for u in jax.tree.leaves(updates)) and refreshes(state).min() == 1


@pytest.mark.parametrize("make, rate", [(gj.galore_sgd, 3.0), (gj.galore_adamw, 3e-2)])
@pytest.mark.sampled(1)
def test_windows_of_projected_gradients(make, rate):
    """The sums are those of projections of the gradients, in the one basis of the window."""
    every = 3
    tx = gj.accumulate(make(rate, update_proj_gap=2, **OPTIONS), every)

    def projected(params, state, *batch):
        return tx.update(
            gj.projected_value_and_grad(loss, tx)(params, state, *batch)[1], state, params
        )

    def full(params, state, *batch):
        return tx.update(jax.grad(loss)(params, *batch), state, params)

    projected, full = jax.jit(projected), jax.jit(full)
    ours, theirs = (PARAMS, tx.init(PARAMS)), (PARAMS, tx.init(PARAMS))
    for number in range(4 * every):
        (ours_updates, ours_state), (updates, state) = (
            step(*way, *batch(number)) for step, way in ((projected, ours), (full, theirs))
        )
        ours = optax.apply_updates(ours[0], ours_updates), ours_state
        theirs = optax.apply_updates(theirs[0], updates), state
        assert distance(ours[0], theirs[0]) < 1e-5
        np.testing.assert_array_equal(ours_state.mini_step, (number + 1) % every)
        windows = (number + 1) // every
        np.testing.assert_array_equal(refreshes(ours_state), [-(-windows // 2)] * 5)
    assert distance(ours[0], PARAMS) > 0.05


def test_sums_over_micro_batches():
    """Right while no basis moves; several bases have no sum, and that is seen."""
    tx = gj.galore_sgd(1e-2, update_proj_gap=2, **OPTIONS)
    value_and_grad = gj.projected_value_and_grad(loss, tx)
    in_parts = jax.jit(
        optax.microbatching.microbatch(
            value_and_grad,
            argnums=(2, 3),
            microbatch_size=2,
            accumulator=optax.microbatching.AccumulationType.MEAN,
        )
    )
    state = tx.init(PARAMS)
    _, gradient = in_parts(PARAMS, state, *batch(0))
    updates, after = tx.update(gradient, state, PARAMS)
    assert not np.isfinite(updates["square"]).any()
    np.testing.assert_array_equal(after[0].projectors["square"], state[0].projectors["square"])
    _, whole = value_and_grad(PARAMS, state, *batch(0))
    _, state = tx.update(whole, state, PARAMS)
    assert not state[0].refresh_state.due["square"]
    updates, _ = tx.update(in_parts(PARAMS, state, *batch(1))[1], state, PARAMS)
    expected, _ = tx.update(value_and_grad(PARAMS, state, *batch(1))[1], state, PARAMS)
    assert distance(updates, expected) < 1e-5
