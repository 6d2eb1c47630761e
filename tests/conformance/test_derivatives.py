"""Derivatives of updates: right as far as bases stay, refused where they would go through one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj

pytestmark = pytest.mark.standard_promotion

SHAPES = {"w": (6, 8), "stack": (2, 6, 5)}
RATE, STEP = 0.1, 1e-6


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        yield


def model():
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(0.3 * rng.normal(size=s)) for n, s in SHAPES.items()}
    return params, jnp.asarray(rng.normal(size=(4, 6)))


def loss_of(params):
    x = model()[1]
    return jnp.mean(jnp.tanh(x @ params["w"]) ** 2) + jnp.mean(jnp.sin(x @ params["stack"]) ** 2)


def after_two_updates(rate, params, wrap=lambda tx: tx, gap=5, first_order=False, **options):
    """Loss after two updates, the first of which refreshes all bases."""
    adam = optax.scale_by_adam(eps_root=1e-8)
    lens = gj.low_rank_projection(
        adam, 3, refresh=gap, axes=gj.MatrixAxes(), state_dtype="float64", **options
    )
    tx = wrap(optax.chain(lens, optax.scale_by_learning_rate(rate)))
    state = tx.init(params)
    for _ in range(2):
        gradients = jax.grad(loss_of)(params)
        if first_order:
            gradients = jax.lax.stop_gradient(gradients)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return loss_of(params)


VARIANTS = {
    "default": {},
    "svd, keep": {"projector": gj.projectors.svd(), "transport": gj.transport.keep()},
    "rotate": {"transport": gj.transport.rotate()},
    "reset, random": {
        "transport": gj.transport.reset(), "projector": gj.projectors.random_orthonormal(),
    },
    "guarded": {"wrap": lambda tx: gj.apply_if_finite(tx, 3)},
    "windows": {"wrap": lambda tx: gj.accumulate(tx, 1)},
}  # fmt: skip
MODES = {"reverse": jax.grad, "forward": jax.jacfwd}
variants = pytest.mark.parametrize("variant", VARIANTS)


@variants
@pytest.mark.parametrize("mode", MODES)
def test_by_the_learning_rate_is_the_slope(variant, mode):
    params, _ = model()
    loss = jax.jit(lambda rate: after_two_updates(rate, params, **VARIANTS[variant]))
    slope = (loss(RATE + STEP) - loss(RATE - STEP)) / (2 * STEP)
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(jax.jit(MODES[mode](loss))(RATE), slope, rtol=1e-6)


def test_by_a_hyperparameter_of_what_is_inside():
    """The moment is carried through the conditional that may refresh."""
    params, _ = model()
    gradients = [jax.tree.map(lambda x, f=f: jnp.sin(f * x), params) for f in (1.0, 2.0)]

    def size(decay):
        tx = gj.low_rank_projection(
            optax.trace(decay), 3, refresh=1, axes=gj.MatrixAxes(), state_dtype="float64"
        )
        state = tx.init(params)
        for gradient in gradients:
            updates, state = tx.update(gradient, state)
        return optax.tree.norm(updates, squared=True)

    slope = (size(0.5 + STEP) - size(0.5 - STEP)) / (2 * STEP)
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(jax.grad(size)(0.5), slope, rtol=1e-6)
    np.testing.assert_allclose(jax.jacfwd(size)(0.5), slope, rtol=1e-6)


ASKED = {
    "by the initial parameters": lambda f, rate, params: jax.grad(f, 1)(rate, params)["w"],
    "by the initial parameters, forward": lambda f, rate, params: jax.jvp(
        lambda p: f(rate, p), (params,), (params,)
    )[1],
}


@variants
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("jitted", [True, False], ids=["jitted", "eager"])
@pytest.mark.sampled(8)
def test_through_a_refresh_is_refused(variant, asked, jitted):
    def derivative(rate, params):
        return ASKED[asked](
            lambda *args: after_two_updates(*args, **VARIANTS[variant]), rate, params
        )

    run = jax.jit(derivative) if jitted else derivative
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"refresh[^$]*'w'[^$]*stop_gradient"):
        jax.block_until_ready(run(RATE, model()[0]))


def test_a_step_that_refreshes_refuses_the_learning_rate_too():
    params, _ = model()
    slope = jax.jit(jax.grad(lambda rate: after_two_updates(rate, params, gap=1)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="stop_gradient"):
        jax.block_until_ready(slope(RATE))


@variants
def test_first_order_derivatives_take_updates_for_constants(variant):
    params, _ = model()
    options = VARIANTS[variant] | {"first_order": True, "gap": 1}
    reached = []

    def spy(tx):
        tx = VARIANTS[variant].get("wrap", lambda tx: tx)(tx)

        def update(gradients, state, params):
            updates, state = tx.update(gradients, state, params)
            reached.append(optax.apply_updates(params, updates))
            return updates, state

        return optax.GradientTransformation(tx.init, update)

    after_two_updates(RATE, params, **options | {"wrap": spy})
    found = jax.jit(jax.grad(lambda p: after_two_updates(RATE, p, **options)))(params)
    expected = jax.grad(loss_of)(reached[-1])
    for name in SHAPES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-8, atol=1e-12)
