"""Clipping by global norm and steps that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stacked_model as sm

import galore_jax as gj
from galore_jax import layerwise

pytestmark = pytest.mark.standard_promotion

LENS = {"rank": 4, "axes": gj.MatrixAxes(-2, -1), "update_proj_gap": 4}
SGD = gj.galore_sgd(1e-1, momentum=0.9, **LENS)


@pytest.mark.parametrize("max_norm", [0.3, 1e6])
@pytest.mark.sampled(1)
def test_exact_clipping_is_that_of_optax(max_norm):
    data, params = sm.batches(8), sm.initial()
    chained = optax.chain(optax.clip_by_global_norm(max_norm), SGD)
    expected, _, losses = sm.run(sm.ordinary_step(chained), params, chained.init(params), data)
    step = layerwise.train_step(*sm.MODEL, SGD, clip_norm=max_norm, pullback=sm.plain)
    found, _, our_losses = sm.run(step, params, SGD.init(params), data)
    assert sm.distance(found, expected) < 1e-5
    np.testing.assert_allclose(our_losses, losses, rtol=1e-6)
    unclipped, _, _ = sm.run(sm.ordinary_step(SGD), params, SGD.init(params), data)
    assert (sm.distance(unclipped, expected) > 1e-2) == (max_norm == 0.3)


def test_the_previous_norm_by_hand():
    """SGD whose gradient is scaled by the norm of the gradient before it."""
    tx = optax.chain(layerwise.clip_by_previous_norm(0.3), optax.sgd(0.1))
    params, data, previous = sm.initial(), sm.batches(5), 0.0
    found, state, _ = sm.run(layerwise.train_step(*sm.MODEL, tx), params, tx.init(params), data)
    norms = []
    for tokens in data:
        gradients = jax.grad(sm.loss_fn)(params, tokens)
        factor = 1.0 if previous <= 0.3 else 0.3 / previous
        params = jax.tree.map(lambda p, g, f=factor: p - 0.1 * f * g, params, gradients)
        previous = float(optax.tree.norm(gradients))
        norms.append(previous)
    assert min(norms) > 0.3  # every step but the first is clipped
    assert sm.distance(found, params) < 1e-5
    np.testing.assert_allclose(state[0].norm, previous, rtol=1e-5)


def test_the_previous_norm_stays_finite():
    tx = layerwise.clip_by_previous_norm(1.0)
    state = tx.update({"w": jnp.full(4, 2.0)}, tx.init({"w": jnp.ones(4)}))[1]
    assert state.norm == 4.0
    updates, state = tx.update({"w": jnp.full(4, jnp.nan)}, state)
    assert state.norm == 4.0 and not np.any(np.isfinite(updates["w"]))
    updates, _ = tx.update({"w": jnp.ones(4)}, state)
    np.testing.assert_allclose(updates["w"], 0.25)


@pytest.mark.parametrize("bad", [0, -1.0, True, "1", jnp.nan])
def test_bad_norms(bad):
    with pytest.raises(ValueError, match="max_norm"):
        layerwise.clip_by_previous_norm(bad)
    with pytest.raises(ValueError, match="clip_norm"):
        layerwise.train_step(*sm.MODEL, SGD, clip_norm=bad)


@jax.custom_vjp
def poison(x, bad):
    """`x`, whose cotangent is NaN if `bad`."""
    del bad
    return x


poison.defvjp(
    lambda x, bad: (x, bad), lambda bad, cotangent: (jnp.where(bad, jnp.nan, cotangent), None)
)
POISONED_LAYER = 2


def poisoned(kind):
    """The model, of which one piece returns, or sends back, what is not finite."""

    def embed(params, tokens):
        return sm.embed(params, tokens), jnp.zeros(())

    def block(layer, x):
        x, number = x
        bad = (number == POISONED_LAYER) & (kind == "block")
        return poison(sm.block(layer, x), bad), number + 1

    def head(params, x, tokens):
        kernel = poison(params["lm_head"]["kernel"], kind == "head")
        loss = sm.head({**params, "lm_head": {"kernel": kernel}}, x[0], tokens)
        return jnp.inf * loss if kind == "loss" else loss

    return embed, block, head


@pytest.mark.parametrize("kind", ["loss", "head", "block"])
@pytest.mark.sampled(1)
def test_what_a_step_that_is_not_finite_changes(kind):
    tx = gj.galore_adamw(1e-2, **LENS)
    params, state = sm.initial(), tx.init(sm.initial())
    step = jax.jit(layerwise.train_step(*poisoned(kind), tx))
    new_params, new_state, metrics = step(params, state, sm.batches(1)[0])
    for array in jax.tree.leaves((new_params, new_state)):
        assert np.all(np.isfinite(array))
    moved = {
        "head": not same(new_params["lm_head"], params["lm_head"]),
        "embed": not same(new_params["embed"], params["embed"]),
        "blocks": [
            not same(
                *(jax.tree.map(lambda x, i=i: x[i], p["blocks"]) for p in (new_params, params))
            )
            for i in range(sm.LAYERS)
        ],
    }
    if kind == "loss":
        assert metrics.skipped == sm.LAYERS + 1
        assert moved == {"head": False, "embed": False, "blocks": [False] * 4}
        assert same(new_state, state)
        return
    if kind == "head":
        assert metrics.skipped == 1
        assert moved == {"head": False, "embed": True, "blocks": [True] * 4}
    if kind == "block":  # nothing comes through to the layers before it
        assert metrics.skipped == POISONED_LAYER + 1 + 1
        assert moved == {"head": True, "embed": False, "blocks": [False] * 3 + [True]}
    lens = new_state[0]
    assert lens.count == lens.inner_state.count == 1
    mu = lens.inner_state.mu["blocks.up.kernel"]
    assert [bool(np.any(x)) for x in mu] == moved["blocks"]
    # A basis that could not be found is looked for again.
    due = lens.refresh_state.due["blocks.up.kernel"]
    assert [not x for x in due.tolist()] == moved["blocks"]


@pytest.mark.parametrize("pullback", sm.PULLBACKS)
def test_a_basis_moves_with_its_moments_or_not_at_all(pullback):
    """One matrix of a block has no finite gradient: the other one waits for it, in every part."""

    def block(layer, x):
        scale = poison(layer["norm"]["scale"], True)
        return sm.block({**layer, "norm": {"scale": scale}}, x)

    tx = gj.galore_adamw(1e-2, transport=gj.transport.rotate(), **LENS)
    step, bad_step = (
        jax.jit(layerwise.train_step(sm.embed, block, sm.head, tx, **sm.PULLBACKS[pullback]))
        for block in (sm.block, block)
    )
    params, state, tokens = sm.initial(), tx.init(sm.initial()), sm.batches(1)[0]
    for _ in range(2):
        params, state, _ = step(params, state, tokens)
    books = state[0].refresh_state
    due = jax.tree.map(jnp.ones_like, books.due)
    state = (state[0]._replace(refresh_state=books._replace(due=due)), *state[1:])
    new_params, new, metrics = bad_step(params, state, tokens)
    assert metrics.skipped == sm.LAYERS and new[0].count == 3
    before, after = sm.by_path((params, state)), sm.by_path((new_params, new))
    held = [path for path in before if "blocks/" in path and "kernel" in path]
    assert sum("inner_state" in path for path in held) == 4
    for path in held:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)


def layer(params, number):
    return jax.tree.map(lambda x: x[number], params["blocks"])


def same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_without_the_guard_what_is_not_finite_spreads():
    tx = optax.sgd(1e-2)
    step = layerwise.train_step(*poisoned("block"), tx, skip_nonfinite=False)
    params, _, metrics = jax.jit(step)(sm.initial(), tx.init(sm.initial()), sm.batches(1)[0])
    kernel = params["blocks"]["up"]["kernel"]
    assert metrics.skipped == 0 and not np.isfinite(metrics.grad_norm)
    assert np.all(np.isnan(kernel[:3])) and np.all(np.isfinite(kernel[3]))


def test_with_exact_clipping_nothing_changes_unless_the_norm_is_finite():
    step = jax.jit(layerwise.train_step(*poisoned("block"), SGD, clip_norm=1.0))
    params, state = sm.initial(), SGD.init(sm.initial())
    new_params, new_state, metrics = step(params, state, sm.batches(1)[0])
    assert metrics.skipped == sm.LAYERS + 1
    assert same((new_params, new_state), (params, state))
