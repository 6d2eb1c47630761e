"""Shares of gradients, compared with float64 products and with what an update gives back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_runs import (
    AXES,
    PARAMS,
    PROJECTED,
    RANK,
    SHAPES,
    bases,
    lens,
    matrices,
    states,
    wandering,
)

import galore_jax as gj
from galore_jax import codecs, projectors


def spans(state, name):
    """Orthonormal columns that span what is stored, float64."""
    return np.linalg.qr(bases(state, name))[0]


CODECS = {
    "identity": (codecs.identity(), 1e-6),
    "bfloat16": (codecs.cast("bfloat16"), 1e-5),
    "int4": (codecs.int4(block=8), 1e-5),
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.sampled(1)
def test_it_is_the_share_in_the_span_of_the_stored_basis(codec):
    stored, atol = CODECS[codec]
    gradients = list(wandering(3))
    state = states(lens(codec=stored), gradients[:1])[-1]
    share = jax.jit(gj.captured_energy)
    for gradient in gradients:  # the one that the basis was made of, and others
        seen = share(gradient, state)
        assert tuple(seen) == PROJECTED
        for name in PROJECTED:
            whole, span = matrices(name, gradient[name]), spans(state, name)
            kept = np.sum((whole @ span) ** 2, (-2, -1)) / np.sum(whole**2, (-2, -1))
            assert np.all(kept < 0.95)
            np.testing.assert_allclose(np.ravel(seen[name]), kept, atol=atol)


@pytest.mark.parametrize("side", ["short", "long", "input", "output"])
@pytest.mark.sampled(1)
def test_it_is_what_an_update_gives_back(side):
    """With an inner transformation that does nothing, an update is G·P·Pᵀ."""
    tx = lens(optax.identity(), side=side, refresh=10)
    first, then = wandering(2)
    state = states(tx, [first])[-1]
    updates, _ = jax.jit(tx.update)(then, state)
    for name, share in gj.captured_energy(then, state).items():
        batch = tuple(range(share.ndim, len(SHAPES[name])))
        kept, whole = (np.sum(np.asarray(x[name]) ** 2, axis=batch) for x in (updates, then))
        assert np.all(kept / whole < 0.9)
        np.testing.assert_allclose(share, kept / whole, atol=1e-5)


def test_all_of_it_and_none_of_it():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    held, missed = (
        {"tall": jnp.asarray(rng.normal(size=(9, 2)) @ directions[:, i : i + 2].T, jnp.float32)}
        for i in (0, 2)
    )
    state = states(lens(projector=projectors.svd()), [held], {"tall": PARAMS["tall"]})[-1]
    np.testing.assert_allclose(gj.captured_energy(held, state)["tall"], 1, atol=1e-5)
    np.testing.assert_allclose(gj.captured_energy(missed, state)["tall"], 0, atol=1e-5)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_it_does_not_depend_on_the_size_of_a_gradient(factor):
    first, then = wandering(2)
    state = states(lens(), [first])[-1]
    scaled = jax.tree.map(lambda g: g * jnp.float32(factor), then)
    for one, other in zip(
        gj.captured_energy(scaled, state).values(),
        gj.captured_energy(then, state).values(),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_gradients_in_bfloat16():
    first, then = wandering(2)
    state = states(lens(), [first])[-1]
    half = jax.tree.map(lambda g: g.astype(jnp.bfloat16), then)
    exact = jax.tree.map(lambda g: g.astype(jnp.float32), half)
    wanted = gj.captured_energy(exact, state)
    for name, share in gj.captured_energy(half, state).items():
        assert share.dtype == jnp.float32
        # The basis is rounded to what the gradient is made of, as it is in an update.
        np.testing.assert_allclose(share, wanted[name], atol=1e-2)


def test_nothing_is_lost_of_zero_and_nothing_known_of_what_is_not_finite():
    first, then = wandering(2)
    state = states(lens(), [first])[-1]
    wanted = gj.captured_energy(then, state)["stack"]
    spoilt = then["stack"].at[0].set(0).at[1, 0, 0].set(jnp.nan)
    share = gj.captured_energy(then | {"stack": spoilt}, state)["stack"]
    assert share[0] == 1 and np.isnan(share[1])
    np.testing.assert_allclose(share[2], wanted[2], rtol=1e-6)
    infinite = then | {"tall": then["tall"].at[0, 0].set(jnp.inf)}
    assert np.isnan(gj.captured_energy(infinite, state)["tall"])


def test_columns_of_zeros_count_for_nothing():
    """What few bits may make of small ones."""
    first, then = wandering(2)
    state = states(lens(), [first])[-1]
    basis = state.projectors["tall"]
    one = basis[:, :1]
    state.projectors["tall"] = basis.at[:, 1].set(0)
    whole = np.asarray(then["tall"], np.float64)
    wanted = np.sum((whole @ np.asarray(one)) ** 2) / np.sum(whole**2)
    np.testing.assert_allclose(gj.captured_energy(then, state)["tall"], wanted, rtol=1e-4)


def test_a_fresh_basis_holds_more_than_an_old_one():
    tx = lens(refresh=1)
    first, then = wandering(2)
    before, after = states(tx, [first, then])[1:]
    for name in PROJECTED:
        old, new = (gj.captured_energy(then, state)[name] for state in (before, after))
        assert np.all(new > old)


# Any state that holds a lens

SMALL = {"stack": PARAMS["stack"], "bias": PARAMS["bias"]}


def galore():
    return gj.galore_sgd(1e-2, RANK, axes=AXES)


WRAPPED = {
    "masked": lambda: optax.masked(galore(), {"stack": True, "bias": False}),
    "partition": lambda: optax.partition(
        {"matrix": galore(), "rest": optax.sgd(1e-2)}, {"stack": "matrix", "bias": "rest"}
    ),
    "MultiSteps": lambda: optax.MultiSteps(galore(), 1).gradient_transformation(),
    "apply_if_finite": lambda: optax.chain(optax.identity(), gj.apply_if_finite(galore(), 3)),
}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.sampled(1)
def test_lenses_are_found_wherever_they_are(wrapper):
    first, then = wandering(2, SMALL)
    bare = gj.captured_energy(then, states(galore(), [first], SMALL)[-1])
    seen = gj.captured_energy(then, states(WRAPPED[wrapper](), [first], SMALL)[-1])
    assert seen.keys() == bare.keys() == {"stack"}
    np.testing.assert_allclose(seen["stack"], bare["stack"], atol=1e-5)


def test_inside_a_window_it_is_the_basis_of_the_window():
    """The lens itself still has the one of the window before."""
    first, then = wandering(2, SMALL)
    state = states(gj.accumulate(galore(), 2), [first], SMALL)[-1]
    alone = states(galore(), [first], SMALL)[-1]
    assert int(gj.metrics(state)["stack"].refreshes[0]) == 0
    np.testing.assert_allclose(
        gj.captured_energy(then, state)["stack"],
        gj.captured_energy(then, alone)["stack"],
        atol=1e-5,
    )


def test_without_a_lens_there_is_nothing():
    assert gj.captured_energy(PARAMS, optax.sgd(1e-2).init(PARAMS)) == {}


# What it cannot answer


def test_a_projected_gradient_is_refused_by_name():
    state = lens().init(PARAMS)
    gradient = gj.ProjectedGradient(jnp.ones((9, RANK)), state.projectors["tall"])
    with pytest.raises(ValueError, match=r"leaf 'tall' has a ProjectedGradient.*in full"):
        gj.captured_energy(PARAMS | {"tall": gradient}, state)


def test_a_missing_gradient_is_named():
    given = {name: g for name, g in PARAMS.items() if name != "stack"}
    with pytest.raises(ValueError, match=r"leaf 'stack'.*no gradient.*'bias', 'heads', 'tall'"):
        gj.captured_energy(given, lens().init(PARAMS))


def test_a_gradient_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"leaf 'tall'.*basis of shape \(6, 2\).*\(7, 2\)"):
        gj.captured_energy(PARAMS | {"tall": jnp.ones((9, 7))}, lens().init(PARAMS))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_gradients_in_shards(kind):
    params = {"w": jnp.zeros((16, 8))}
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    sharding = {"w": NamedSharding(mesh, P("data", "model"))}
    tx = gj.galore_sgd(1e-2, RANK)
    first, then = wandering(2, params)
    state = states(tx, [first], params)[-1]
    wanted = gj.captured_energy(then, state)["w"]
    placed = jax.device_put(state, gj.state_sharding(tx, params, sharding))
    for share in (gj.captured_energy, jax.jit(gj.captured_energy)):
        seen = share(jax.device_put(then, sharding), placed)["w"]
        np.testing.assert_allclose(seen, wanted, atol=1e-5)
        assert seen.sharding.is_fully_replicated
