"""What happens to a basis that no gradient, a useless one, or more than one speaks for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import distance, normal

import galore_jax as gj

PARAMS = {"w": normal((10, 12)), "stack": normal((3, 10, 12), 1), "idle": normal((10, 12), 2)}
TX = gj.galore_sgd(0.1, 3, axes=gj.MatrixAxes(), update_proj_gap=2)
START = TX.init(PARAMS)
X = normal((7, 10), 3)
WEIGHTS = jnp.ones((3, 1, 1))


def loss(params, x, weights):
    """`weights` multiply what comes out of each matrix of the stack."""
    one = jnp.sum(jnp.sin(gj.matmul(x, params["w"])))
    return one + jnp.sum(weights * jnp.sin(gj.matmul(x, params["stack"])))


@jax.jit
def step(state, x, weights):
    _, gradient = gj.projected_value_and_grad(loss, TX)(PARAMS, state, x, weights)
    return gradient, *TX.update(gradient, state, PARAMS)


@pytest.fixture(scope="module")
def later():
    """A state in which everything is due for the second time."""
    state = START
    for _ in range(2):
        *_, state = step(state, X, WEIGHTS)
    assert state[0].refresh_state.due["w"] and state[0].refresh_state.refreshes["w"] == 1
    return state


def unmoved(after, before, leaf, index=...):
    np.testing.assert_array_equal(
        after[0].projectors[leaf][index], before[0].projectors[leaf][index]
    )
    np.testing.assert_array_equal(
        after[0].refresh_state.refreshes[leaf][index],
        before[0].refresh_state.refreshes[leaf][index],
    )
    assert np.all(after[0].refresh_state.due[leaf][index])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("when", ["first", "later"])
def test_activations_that_are_not_finite(later, when, value):
    state = START if when == "first" else later
    _, updates, after = step(state, X.at[2, 3].set(value), WEIGHTS)
    for leaf in ("w", "stack"):
        unmoved(after, state, leaf)
        assert not np.isfinite(updates[leaf]).all()  # as with the gradient itself
    *_, again = step(state, X, WEIGHTS)
    assert again[0].refresh_state.refreshes["w"] == state[0].refresh_state.refreshes["w"] + 1


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("when", ["first", "later"])
def test_cotangents_of_one_matrix(later, when, value):
    """It stays due, and its neighbours do not care."""
    state = START if when == "first" else later
    gradient, updates, after = step(state, X, WEIGHTS.at[1].set(value))
    unmoved(after, state, "stack", 1)
    np.testing.assert_array_equal(gradient["stack"].moved, [True, False, True])
    np.testing.assert_array_equal(after[0].refresh_state.due["stack"], [False, True, False])
    assert np.isfinite(updates["stack"][0]).all() and np.isfinite(updates["w"]).all()
    if value == 0:
        np.testing.assert_array_equal(updates["stack"][1], jnp.zeros((10, 12)))


def test_rows_that_never_meet(later):
    """Neither activations nor cotangents are zero, and the gradient is."""
    rows = jnp.arange(7)[:, None]

    def loss(params, x):
        weights = jnp.where(rows < 4, 0.0, 1.0)
        return jnp.sum(weights * jnp.sin(gj.matmul(x, params["w"])))

    x = jnp.where(rows < 4, X, 0.0)
    _, gradient = jax.jit(gj.projected_value_and_grad(loss, TX))(PARAMS, later, x)
    assert not gradient["w"].moved
    assert not gradient["w"].value.any()


def test_a_weight_that_is_not_used(later):
    gradient, updates, after = step(later, X, WEIGHTS)
    unmoved(after, later, "idle")
    np.testing.assert_array_equal(updates["idle"], jnp.zeros((10, 12)))
    assert not gradient["idle"].moved and not gradient["idle"].value.any()


def twice(params, x):
    first = jnp.sum(jnp.sin(gj.matmul(x, params["w"])))
    return first + jnp.sum(jnp.cos(gj.matmul(2 * x[:5], params["w"])))


def of_a_loop(params, x):
    """A weight that all layers share."""

    def layer(h, _):
        return jnp.tanh(gj.matmul(h, params["square"])), None

    return jnp.sum(jax.lax.scan(layer, x, length=3)[0] ** 2)


SEVERAL = {"twice": (twice, "w"), "a loop": (of_a_loop, "square")}


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.sampled(1)
def test_several_products(name):
    """Right as long as no basis is sought; then not a number, and nothing taken over."""
    loss, leaf = SEVERAL[name]
    params = {"w": PARAMS["w"], "square": normal((10, 10), 4)}
    tx = gj.galore_sgd(0.1, 3, update_proj_gap=2)
    fn = jax.jit(gj.projected_value_and_grad(loss, tx))
    state = tx.init(params)
    value, gradient = fn(params, state, X)
    assert value == jnp.float32(loss(params, X)) or distance(value, loss(params, X)) < 1e-6
    assert not np.isfinite(gradient[leaf].value).any() and gradient[leaf].moved
    _, after = tx.update(gradient, state, params)
    unmoved(after, state, leaf)
    # With a basis from elsewhere, on a step on which nothing is due:
    _, exact = jax.value_and_grad(loss)(params, X)
    _, state = tx.update(exact, state, params)
    _, gradient = fn(params, state, X)
    assert not gradient[leaf].moved
    basis = state[0].projectors[leaf]
    assert distance(gradient[leaf].basis, basis) < 1e-6
    assert distance(gradient[leaf].value, exact[leaf].T @ basis) < 1e-5
    updates, _ = tx.update(gradient, state, params)
    expected, _ = tx.update(exact, state, params)
    assert distance(updates[leaf], expected[leaf]) < 1e-5


def test_several_products_with_a_decoded_weight():
    """The way out: the gradient is formed, summed up, and projected once."""

    def decoded(params, x):
        return twice({"w": params["w"].astype(x.dtype)}, x)

    params = {"w": PARAMS["w"]}
    tx = gj.galore_sgd(0.1, 3, update_proj_gap=2)
    state = tx.init(params)
    _, gradient = jax.jit(gj.projected_value_and_grad(decoded, tx))(params, state, X)
    updates, _ = tx.update(gradient, state, params)
    expected, _ = tx.update(jax.grad(twice)(params, X), state, params)
    assert distance(updates, expected) < 1e-5


@pytest.mark.parametrize("scale", [2.0**-50, 2.0**50])
def test_tiny_and_huge_gradients(scale):
    """The basis does not depend on the size of the gradient (powers of two round nothing)."""
    tx = gj.galore_sgd(0.1, 3)
    params = {"w": PARAMS["w"]}

    def basis(factor):
        fn = gj.projected_value_and_grad(
            lambda p, x: factor * jnp.sum(jnp.sin(gj.matmul(x, p["w"]))), tx
        )
        return jax.jit(fn)(params, tx.init(params), X)[1]["w"]

    one, other = basis(1.0), basis(scale)
    assert one.moved and other.moved
    assert distance(other.basis @ other.basis.T, one.basis @ one.basis.T) < 1e-6


def test_a_weight_without_a_product_adds_nothing():
    """Whatever is added to its gradient stays what it is, matrix by matrix of a stack."""
    params = {"stack": normal((3, 6, 4)), "other": normal((6, 4), 1)}
    tx = gj.galore_sgd(0.1, rank=2, axes=gj.MatrixAxes(-2, -1), update_proj_gap=2)
    x = normal((5, 6), seed=3)

    def gradient_of(state, *numbers):
        def loss(params):
            return sum(jnp.sum(jnp.sin(x @ params["stack"][number])) for number in numbers)

        with jax.debug_nans(True):
            return gj.projected_value_and_grad(loss, tx)(params, state)[1]

    state = tx.init(params)
    for step in range(3):  # the first and the last find new bases
        whole, first, rest = (gradient_of(state, *n) for n in ((0, 1, 2), (0,), (1, 2)))
        assert not any(np.any(part) for part in jax.tree.leaves(whole["other"]))
        assert not np.any(rest["stack"].has_basis[0]) and np.all(rest["stack"].has_basis[1:])
        for one, other in ((first, rest), (rest, first)):
            total = jax.tree.map(jnp.add, one, other)["stack"]
            assert not np.any(total.is_sum)
            np.testing.assert_array_equal(total.moved, np.full(3, step % 2 == 0))
            np.testing.assert_allclose(total.basis, whole["stack"].basis, atol=1e-6)
            np.testing.assert_allclose(total.value, whole["stack"].value, atol=1e-6)
        with jax.debug_nans(True):
            _, state = tx.update(whole, state, params)
        assert gj.metrics(state)["other"].refreshes == 0
