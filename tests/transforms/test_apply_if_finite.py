"""Optax's rule for gradients that are not finite, also for projected and for per-device ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import galore_jax as gj

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction

PARAMS = {"w": jnp.ones((24, 16)), "b": jnp.ones((16,))}
BAD = (2, 3, 4, 7)  # steps with a NaN


def gradients(step):
    rng = np.random.default_rng(step)
    grads = {k: jnp.asarray(rng.normal(size=p.shape), jnp.float32) for k, p in PARAMS.items()}
    return grads | {"b": grads["b"].at[1].set(jnp.nan)} if step in BAD else grads


@pytest.mark.parametrize("patience", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "inner", [optax.adam(1e-2), gj.galore_adamw(1e-2, rank=4)], ids=["adam", "galore"]
)
def test_equals_optax(inner, patience):
    ours, theirs = gj.apply_if_finite(inner, patience), optax.apply_if_finite(inner, patience)
    state, expected_state = ours.init(PARAMS), theirs.init(PARAMS)
    updates, expected = jax.jit(ours.update), jax.jit(theirs.update)
    for step in range(9):
        got, state = updates(gradients(step), state, PARAMS)
        want, expected_state = expected(gradients(step), expected_state, PARAMS)
        for a, b in zip(
            jax.tree.leaves((got, tuple(state))), jax.tree.leaves((want, tuple(expected_state))),
            strict=True,
        ):  # fmt: skip
            np.testing.assert_array_equal(a, b)
    assert state.total_notfinite == len(BAD)


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.sampled(1)
def test_takes_projected_gradients(every):
    """Optax's own cannot: its zeros have the shapes of what it was given."""

    def loss(params, x):
        return jnp.mean((x @ params["w"] + params["b"]) ** 2)

    tx = gj.apply_if_finite(gj.galore_adamw(1e-2, rank=4), 3)
    tx = tx if every is None else gj.accumulate(tx, every)
    grad = gj.projected_value_and_grad(loss, tx)
    state, x = tx.init(PARAMS), jnp.ones((8, 24))
    seen = []
    for batch in (x, x, x.at[0, 0].set(jnp.nan), x, x, x):
        updates, state = tx.update(grad(PARAMS, state, batch)[1], state, PARAMS)
        seen.append(float(jnp.sum(jnp.abs(updates["w"]))))
        assert np.isfinite(seen[-1])
    finite = state if every is None else state.opt_state
    assert finite.total_notfinite == 1
    assert [s > 0 for s in seen] == (
        [True, True, False, True, True, True]
        if every is None
        else [False, True, False, False, False, True]
    )


def test_all_devices_skip_together():
    tx = gj.apply_if_finite(gj.galore_sgd(1e-2, rank=4, axis_name="data"), 3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    @jax.jit
    def update(grads, state):
        return jax.shard_map(
            lambda g, s: tx.update(jax.tree.map(lambda x: x[0], g), s, PARAMS),
            mesh=mesh,
            in_specs=(P("data"), P()),
            out_specs=P(),
        )(grads, state)

    good = jax.tree.map(lambda *x: jnp.stack(x), *(gradients(i) for i in (10, 11, 12, 13) * 2))
    bad = good | {"w": good["w"].at[5, 2, 2].set(jnp.inf)}
    updates, state = update(bad, tx.init(PARAMS))
    assert state.total_notfinite == 1 and not np.any(updates["w"])
    updates, state = update(good, state)
    assert state.notfinite_count == 0 and np.any(updates["w"])
    np.testing.assert_array_equal(state.inner_state[0].refresh_state.refreshes["w"], 1)
