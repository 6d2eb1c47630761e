"""Training without gradients goes where training with gradients goes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import (
    ALL_SHAPES,
    AXES,
    GAP,
    OPTIONS,
    RANK,
    SHAPES,
    TWO_SHAPES,
    compare,
    data,
    distance,
    draw,
    full,
    loss,
    loss_of_all,
    loss_of_two,
    projected,
    refreshes,
    rematted,
    unrolled,
)

import galore_jax as gj
from galore_jax import projectors, refresh, transport

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction

ADAMW = functools.partial(gj.galore_adamw, 3e-2, **OPTIONS)
SGD = functools.partial(gj.galore_sgd, 0.5, **OPTIONS)


OPTIMIZERS = {
    "adamw": functools.partial(ADAMW, weight_decay=0.1),
    "adafactor": functools.partial(gj.galore_adafactor, 1e-2, **OPTIONS),
    "lion": functools.partial(gj.galore_lion, 1e-2, **OPTIONS),
    "momentum": functools.partial(gj.galore_sgd, 0.05, momentum=0.9, **OPTIONS),
    "long": functools.partial(SGD, side="long"),
    "input": functools.partial(SGD, side="input"),
    "output": functools.partial(SGD, side="output"),
    "oversampled": functools.partial(SGD, projector=projectors.randomized_svd(oversample=3)),
    "cold": functools.partial(SGD, projector=projectors.randomized_svd(warm_start=False)),
    "subspace iteration": functools.partial(SGD, projector=projectors.subspace_iteration(2)),
    "random": functools.partial(SGD, projector=projectors.random_orthonormal()),
    "reset": functools.partial(ADAMW, transport=transport.reset()),
    "rotate": functools.partial(ADAMW, transport=transport.rotate()),
    "staggered": functools.partial(SGD, update_proj_gap=refresh.staggered(GAP)),
    "adaptive": functools.partial(SGD, update_proj_gap=refresh.adaptive(2, patience=1)),
    "int8 bases": functools.partial(SGD, codec=gj.codecs.int8()),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.sampled(3)
def test_every_optimizer(name):
    losses, way, *_ = compare(OPTIMIZERS[name](), loss_of_two, draw(TWO_SHAPES), data())
    assert losses < 1e-5 and way < 1e-5


@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.sampled(1)
def test_every_kind_of_product(side):
    losses, way, *_ = compare(SGD(side=side), loss_of_all, draw(ALL_SHAPES), data())
    assert losses < 1e-5 and way < 1e-5


def projections(tx, state, gradient, params):
    """R and P of every projected leaf, from a gradient that exists."""
    lens = state[0]
    plans = gj.views.leaf_plan(lens.config, params)
    leaves, bases = map(jax.tree.leaves, (gradient, lens.projectors))
    return {
        plan.path: (plan.view.project(leaf, basis), basis)
        for plan, leaf, basis in zip(plans, leaves, bases, strict=True)
        if plan.view is not None
    }


def arrived(gradient):
    """R and P of every projected leaf, of a gradient that arrived so."""
    is_one = lambda node: isinstance(node, gj.ProjectedGradient)  # noqa: E731
    with_path, _ = jax.tree_util.tree_flatten_with_path(gradient, is_leaf=is_one)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in with_path
        if is_one(leaf)
    }


def test_a_step_is_the_projection_of_the_gradient():
    """The definition, step by step, along a way that both share.

    In double precision: in single a subspace is no better than the gap that it ends at.
    """
    with jax.enable_x64(True):
        tx, params = SGD(state_dtype="float64"), draw(ALL_SHAPES, dtype=jnp.float64)
        state = tx.init(params)
        plain = jax.jit(jax.value_and_grad(loss_of_all_wide))
        ours = jax.jit(gj.projected_value_and_grad(loss_of_all_wide, tx))
        update = jax.jit(tx.update)
        for step, batch in enumerate(zip(*data(GAP + 2, dtype=jnp.float64), strict=True)):
            value, gradient = ours(params, state, *batch)
            expected_value, expected = plain(params, *batch)
            np.testing.assert_allclose(value, expected_value, rtol=1e-12)
            np.testing.assert_allclose(gradient["embed"], expected["embed"], atol=1e-12)
            _, state = update(expected, state, params)
            seen = arrived(gradient)
            wanted = projections(tx, state, expected, params)  # in the bases of this step
            assert seen.keys() == wanted.keys() == {
                "blocks/up", "blocks/down", "heads", "inner", "merge", "outer", "square",
            }  # fmt: skip
            for path, (low_rank, basis) in wanted.items():
                moved = np.full(basis.shape[:-2], step % GAP == 0)
                np.testing.assert_array_equal(seen[path].moved, moved)
                # Columns of a basis turn into each other where nothing tells them apart: what
                # counts is the subspace.
                lifted = [
                    jnp.einsum("...kr,...pr->...kp", *pair)
                    for pair in ((seen[path].value, seen[path].basis), (low_rank, basis))
                ]
                assert distance(*lifted) < 1e-12, path
            params = jax.tree.map(lambda p, g: p - 0.5 * g, params, expected)


FORMS = {
    "rematerialised": rematted,
    "keeping dots": functools.partial(rematted, policy=jax.checkpoint_policies.dots_saveable),
    "keeping all": functools.partial(rematted, policy=jax.checkpoint_policies.everything_saveable),
    "unrolled": unrolled,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.sampled(1)
def test_every_form_of_the_layers(form):
    losses, way, *_ = compare(
        SGD(), functools.partial(loss, blocks=FORMS[form]), draw(SHAPES), data(), reference=loss
    )
    assert losses < 1e-5 and way < 1e-5


def test_decoded_weights_have_their_gradients_projected():
    """Any model at all, and several products."""

    def by_hand(params, tokens, target):
        blocks = jax.tree.map(lambda w: w.astype(jnp.float32), params["blocks"], is_leaf=is_weight)
        square = params["square"].astype(jnp.float32)
        h = unrolled(params["embed"][tokens], blocks)
        return jnp.mean((jnp.tanh(h @ square) @ square.T - target) ** 2)

    losses, way, *_ = compare(SGD(), by_hand, draw(SHAPES), data())
    assert losses < 1e-5 and way < 1e-5


def is_weight(node):
    return isinstance(node, gj.backward.ProjectedWeight)


# What is rounded to few bits tips over here and there when a sum is taken in another order.
def few_bits(rate, codec, refresh):
    """As in `galore_adamw8bit`, for moments of any size."""
    adam = gj.scale_by_adam8bit(block=16, min_size=1)
    lens = gj.low_rank_projection(adam, RANK, refresh=refresh, axes=AXES, codec=codec)
    return optax.chain(lens, optax.scale_by_learning_rate(rate))


def codes_of(shapes):
    return gj.quant.quantize_params(draw(shapes))


FEW_BITS = {
    "8-bit moments": (lambda: few_bits(1e-2, gj.codecs.cast("bfloat16"), GAP), draw),
    "int8 weights": (lambda: gj.galore_adamw(3e-2, **OPTIONS), codes_of),
    "q_galore": (
        lambda: few_bits(1e-2, gj.codecs.int4(), refresh.adaptive(2, patience=1)), codes_of
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FEW_BITS)
@pytest.mark.sampled(1)
def test_few_bits(name):
    make, params = FEW_BITS[name]
    losses, _, *states = compare(make(), loss, params(SHAPES), data(12))
    assert losses < 1e-4
    assert name == "int8 weights" or sum(codes.size for codes in integers(states[0])) > 1000


def integers(tree):
    """Codes, not counts."""
    return [x for x in jax.tree.leaves(tree) if x.dtype in (jnp.int8, jnp.uint8)]


@pytest.mark.parametrize("name", FEW_BITS)
@pytest.mark.sampled(1)
def test_codes_after_one_step(name):
    """From one state to the next, refresh included, a code here and there differs by one."""
    make, params = FEW_BITS[name]
    tx, params = make(), params(SHAPES)
    steps = [jax.jit(way(loss, tx)) for way in (projected, full)]
    state = tx.init(params)
    for number, batch in enumerate(zip(*data(4), strict=True)):
        (_, _, ours), (_, updates, state) = (step(params, state, *batch) for step in steps)
        tipped = 0
        for one, other in zip(integers(ours), integers(state), strict=True):
            apart = np.abs(np.asarray(one, int) - np.asarray(other, int))
            assert np.isin(apart, [0, 1, 15, 16, 17]).all()  # two codes of 4 bits in a byte
            tipped += np.count_nonzero(apart)
        size = sum(codes.size for codes in integers(state))
        assert tipped <= 1e-3 * size and (size > 1000 or name == "int8 weights")
        params = gj.apply_updates(params, updates, key=jax.random.key(number))


def test_bfloat16():
    """Both round, at different places: the ways are as far apart as two such ways are."""
    params = draw(SHAPES, dtype=jnp.bfloat16)
    tx = SGD(update_proj_gap=1000)
    batch = jax.tree.map(lambda x: x[0], data(1, dtype=jnp.bfloat16))
    value, gradient = jax.jit(gj.projected_value_and_grad(loss, tx))(
        params, tx.init(params), *batch
    )
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    exact_value, exact = jax.value_and_grad(loss)(wide, *batch)
    _, rounded = jax.value_and_grad(loss)(params, *batch)
    np.testing.assert_allclose(value, exact_value, rtol=1e-2)
    for path, leaf in arrived(gradient).items():
        view = next(p.view for p in gj.views.leaf_plan(tx.init(params)[0].config, params) if p.path == path)  # fmt: skip  # noqa: E501
        assert leaf.value.dtype == jnp.float32
        errors = [
            distance(low_rank, view.project(leaf_of(exact, path), leaf.basis))
            for low_rank in (leaf.value, view.project(leaf_of(rounded, path), leaf.basis))
        ]
        assert errors[0] < 2e-2 and errors[0] < 2 * errors[1], path


def leaf_of(tree, path):
    return functools.reduce(lambda node, name: node[name], path.split("/"), tree)


def test_two_lenses_of_a_partition():
    labels = {"embed": "none", "blocks": {"up": "a", "down": "b", "norm": "none"}, "square": "b"}
    tx = optax.partition(
        {"a": SGD(), "b": ADAMW(side="long", rank=3), "none": optax.sgd(0.5)}, labels
    )
    losses, way, state, _ = compare(tx, loss, draw(SHAPES), data())
    assert losses < 1e-5 and way < 1e-5 and len(refreshes(state)) >= 5


def test_a_masked_lens():
    lens = gj.low_rank_projection(optax.trace(0.5), RANK, refresh=GAP, axes=AXES)
    mask = {"embed": True, "blocks": {"up": False, "down": True, "norm": True}, "square": False}
    tx = optax.chain(optax.masked(lens, mask), optax.scale(-0.2))
    params = draw(SHAPES)
    _, gradient = gj.projected_value_and_grad(loss, tx)(
        params, tx.init(params), *jax.tree.map(lambda x: x[0], data(1))
    )
    assert arrived(gradient).keys() == {"blocks/down"}
    losses, way, *_ = compare(tx, loss, params, data())
    assert losses < 1e-5 and way < 1e-5


def test_auxiliary_output_and_keywords():
    params, batch = draw(SHAPES), jax.tree.map(lambda x: x[0], data(1))

    def with_aux(params, tokens, *, target):
        return loss(params, tokens, target), {"tokens": tokens, "width": params["square"].shape}

    tx = SGD()
    fn = gj.projected_value_and_grad(with_aux, tx, has_aux=True)
    (value, aux), gradient = fn(params, tx.init(params), batch[0], target=batch[1])
    np.testing.assert_allclose(value, loss(params, *batch), rtol=1e-6)
    assert aux["width"] == (12, 12) and aux["tokens"] is batch[0]
    assert set(arrived(gradient)) == {"blocks/up", "blocks/down", "square"}


def test_without_a_lens_it_is_value_and_grad():
    params, batch = draw(SHAPES), jax.tree.map(lambda x: x[0], data(1))
    tx = optax.adam(1e-2)
    value, gradient = gj.projected_value_and_grad(loss, tx)(params, tx.init(params), *batch)
    expected_value, expected = jax.value_and_grad(loss)(params, *batch)
    assert value == expected_value and distance(gradient, expected) < 1e-6


def test_in_double_precision():
    """The formulas themselves, with nothing left to rounding."""
    with jax.enable_x64(True):
        params = draw(ALL_SHAPES, dtype=jnp.float64)
        tx = gj.galore_sgd(0.5, **OPTIONS, state_dtype="float64")
        losses, way, *_ = compare(tx, loss_of_all_wide, params, data(10, dtype=jnp.float64))
    assert losses < 1e-10 and way < 1e-10


def loss_of_all_wide(params, tokens, target):
    return loss_of_all(params, tokens, target, dtype=jnp.float64)
