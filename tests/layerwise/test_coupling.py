"""Transformations that need more than one block's gradient are refused by name; others are not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stacked_model as sm
from galore_jax.layerwise.reach import RANDOM, Reach, reach

import galore_jax as gj
from galore_jax import layerwise
from galore_jax.layerwise.coupling import check_uncoupled
from galore_jax.layerwise.slices import state_axes
from galore_jax.transforms import streaming

pytestmark = pytest.mark.standard_promotion

LENS = {"rank": 4, "axes": gj.MatrixAxes(-2, -1)}
GALORE = gj.galore_sgd(1e-2, **LENS)
ONLY_BLOCKS = {"embed": False, "blocks": True, "norm": False, "lm_head": False}
NOT_BLOCKS = {name: not inside for name, inside in ONLY_BLOCKS.items()}


def trace(tx, params=None, **options):
    params = sm.initial() if params is None else params
    step = layerwise.train_step(*sm.MODEL, tx, **options)
    return jax.eval_shape(step, params, jax.eval_shape(tx.init, params), sm.batches(1)[0])


COUPLED = {
    "clip_by_global_norm": (
        optax.chain(optax.clip_by_global_norm(1.0), GALORE),
        "update of 'blocks/down/kernel' depends on the gradient of 'embed/embedding'",
    ),
    "apply_if_finite": (
        optax.apply_if_finite(GALORE, 3),
        "update of 'blocks/down/kernel' depends on the gradient of 'embed/embedding'",
    ),
    "clip in a window": (
        gj.accumulate(optax.chain(optax.clip_by_global_norm(1.0), GALORE), 2),
        "update of 'blocks/down/kernel' depends on the gradient of 'embed/embedding'",
    ),
    "normalize_by_update_norm": (
        optax.chain(GALORE, optax.normalize_by_update_norm()),
        "update of 'blocks/down/kernel' depends on the gradient of 'embed/embedding'",
    ),
    "norm of the blocks": (
        optax.chain(optax.masked(optax.clip_by_global_norm(1.0), ONLY_BLOCKS), GALORE),
        "update of 'blocks/down/kernel' depends on other layers of 'blocks/down/kernel'",
    ),
    "clip_by_block_rms": (
        optax.chain(optax.clip_by_block_rms(1.0), GALORE),
        "update of 'blocks/down/kernel' depends on other layers",
    ),
    "trust ratio": (optax.lamb(1e-3), "update of 'blocks/down/kernel' depends on other layers"),
    "Adafactor's clip": (
        gj.galore_adafactor(1e-2, **LENS),
        "update of 'blocks/norm/scale' depends on other layers of 'blocks/norm/scale'",
    ),
    "a stack of vectors as a matrix": (
        gj.galore_sgd(1e-2, rank=3, targets=gj.all_matrices),
        "'blocks/norm/scale'",
    ),
    "noise": (
        optax.chain(optax.add_noise(0.1, 0.5, 0), GALORE),
        "update of 'blocks/down/kernel' depends on random numbers drawn for all layers",
    ),
    "a rate for every layer": (
        optax.stateless(
            lambda updates, _: jax.tree.map(
                lambda x: x * 0.9 ** jnp.arange(x.shape[0]).reshape(-1, *[1] * (x.ndim - 1)),
                updates,
            )
        ),
        "update of 'blocks/down/kernel' depends on the number of the layer",
    ),
    "a count of the whole stack": (
        optax.chain(optax.zero_nans(), GALORE),
        "the state '0/found_nan/blocks/down/kernel' depends on 'blocks/down/kernel'",
    ),
}


@pytest.mark.parametrize("name", COUPLED)
def test_refused_by_name(name):
    tx, message = COUPLED[name]
    with pytest.raises(ValueError, match=message) as caught:
        trace(tx)
    if name != "a stack of vectors as a matrix":
        for remedy in ("clip_norm=", "clip_by_previous_norm", "skip_nonfinite", "layers_alone"):
            assert remedy in str(caught.value)


UNCOUPLED = {
    "clip_by_global_norm outside": optax.chain(
        optax.masked(optax.clip_by_global_norm(1.0), NOT_BLOCKS), GALORE),
    "elementwise clip": optax.chain(optax.clip(0.1), optax.adamw(1e-3)),
    "centralize": optax.chain(optax.centralize(), GALORE),
    "amsgrad": optax.amsgrad(1e-3),
    "adadelta": optax.adadelta(1e-2),
    "factored": optax.adafactor(
        1e-3, multiply_by_parameter_scale=False, clipping_threshold=None),
    "schedule": optax.sgd(optax.cosine_decay_schedule(1e-2, 20), momentum=0.9),
    "a norm per layer": optax.stateless(lambda updates, _: {
        **updates, "blocks": jax.vmap(
            lambda tree: optax.tree.scale(1 / optax.tree.norm(tree), tree))(updates["blocks"])}),
    "a loop over the layers": optax.stateless(lambda updates, _: {
        **updates, "blocks": jax.lax.map(
            lambda tree: jax.tree.map(lambda x: x / jnp.max(jnp.abs(x)), tree),
            updates["blocks"])}),
    "an orthogonal factor per layer": optax.stateless(lambda updates, _: {
        **updates, "blocks": jax.tree.map(
            lambda x: jnp.linalg.qr(x)[0] if x.shape[-2:] == (sm.HIDDEN, sm.WIDTH) else x,
            updates["blocks"])}),
    "reset": gj.galore_adamw(1e-2, transport=gj.transport.reset(second="mean"), **LENS),
    "in windows": gj.accumulate(optax.chain(optax.scale(0.5), GALORE), 2),
    "in windows, adaptive": gj.accumulate(
        gj.galore_adamw(1e-2, update_proj_gap=gj.refresh.adaptive(2, patience=1), **LENS), 2),
    "in windows, no lens": gj.accumulate(optax.adamw(1e-3), 2),
    "int8 bases": gj.galore_adamw(1e-2, codec=gj.codecs.int8(block=4), **LENS),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCOUPLED)
def test_accepted(name):
    params, _, _ = trace(UNCOUPLED[name])
    assert sm.signature(params) == sm.signature(jax.eval_shape(sm.initial))


def test_large_stacks_that_are_updated_in_pieces_are_accepted(monkeypatch):
    """A loop that cuts layers out and puts them back where they were."""
    monkeypatch.setattr(streaming, "PIECE", 256)
    tx = gj.low_rank_projection(
        gj.quantized_state(optax.scale_by_adam(), min_size=64, block=16), **LENS
    )
    loops = jax.make_jaxpr(tx.update)(sm.initial(), tx.init(sm.initial())).pretty_print()
    assert "dynamic_update_slice" in loops
    trace(tx)


def test_a_wrapper_that_drops_extra_arguments_is_refused():
    steps = optax.MultiSteps(GALORE, 2)
    with pytest.raises(ValueError, match="drops extra arguments"):
        trace(steps.gradient_transformation())
    trace(optax.GradientTransformationExtraArgs(steps.init, steps.update))
    trace(optax.MultiSteps(optax.sgd(1e-2), 2).gradient_transformation())  # there is no lens in it


def test_a_rate_for_every_layer_is_picked_by_its_number():
    """Held as one array it would not fit the slice of one layer, and is refused."""
    rates = jnp.linspace(0.1, 0.4, sm.LAYERS)

    def scaled(updates, factors):
        def scale(x):
            return x * factors.reshape(-1, *[1] * (x.ndim - 1))

        return {**updates, "blocks": jax.tree.map(scale, updates["blocks"])}

    def picked(updates, state, params=None, *, layer=None, **extra_args):
        return scaled(updates, rates if layer is None else rates[layer][None]), state

    held = optax.stateless(lambda updates, _: scaled(updates, rates))
    with pytest.raises(ValueError, match=r"'blocks/.*one layer at a time.*`layer`"):
        trace(held)
    ordinary = optax.chain(held, optax.scale(-1.0))
    ours = optax.chain(
        optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), picked),
        optax.scale(-1.0),
    )
    params, data = sm.initial(), sm.batches(3)
    expected, _, _ = sm.run(sm.ordinary_step(ordinary), params, ordinary.init(params), data)
    found, _, _ = sm.run(layerwise.train_step(*sm.MODEL, ours), params, ours.init(params), data)
    assert sm.distance(found, expected) < 1e-6


def test_layers_alone_applies_a_leaf_statistic_to_each_layer():
    """What the transformation does to layers that are leaves of their own."""
    tx, params, tokens = optax.lamb(1e-2, weight_decay=0.1), sm.initial(), sm.batches(1)[0]
    gradients = jax.grad(sm.loss_fn)(params, tokens)

    def apart(tree):
        return {
            **tree,
            "blocks": [jax.tree.map(lambda x, i=i: x[i], tree["blocks"]) for i in range(sm.LAYERS)],
        }

    updates, _ = tx.update(apart(gradients), tx.init(apart(params)), apart(params))
    expected = optax.apply_updates(apart(params), updates)
    step = jax.jit(layerwise.train_step(*sm.MODEL, tx, layers_alone=True))
    found, _, _ = step(params, tx.init(params), tokens)
    assert sm.distance(apart(found), expected) < 1e-6


def test_what_is_read_by_the_update_of_each_leaf():
    params = sm.initial()
    tx = optax.chain(
        optax.masked(optax.clip_by_global_norm(1.0), NOT_BLOCKS),
        optax.scale_by_adam(),
        optax.scale_by_learning_rate(optax.linear_schedule(1.0, 0.0, 10)),
    )
    reads = check_uncoupled(
        tx, params, state_axes(tx, params, "blocks"), blocks="blocks", layers_alone=False
    )
    outside = {"embed/embedding", "norm/scale", "lm_head/kernel"}
    assert reads.updates["lm_head/kernel"] == outside
    assert reads.updates["blocks/up/kernel"] == {"blocks/up/kernel"}
    state = jax.eval_shape(tx.init, params)
    per_array = dict(zip(sm.by_path(tx.init(params)), reads.state, strict=True))
    assert len(jax.tree.leaves(state)) == len(reads.state)
    assert per_array["1/mu/embed/embedding"] == outside
    assert per_array["1/nu/blocks/down/kernel"] == {"blocks/down/kernel"}
    assert per_array["1/count"] == per_array["2/count"] == frozenset()


@pytest.mark.parametrize("factor", [None, 0.0])
def test_what_is_multiplied_by_zero_has_been_read(factor):
    """It may be a NaN. What only says that a basis moves has not, on a step on which none does."""
    tx = gj.accumulate(GALORE, 2) if factor is None else optax.chain(optax.scale(factor))
    params = sm.initial()
    reads = check_uncoupled(
        tx, params, state_axes(tx, params, "blocks"), blocks="blocks", layers_alone=False
    )
    assert reads.updates["blocks/up/kernel"] == {"blocks/up/kernel"}
    if factor is None:
        per_array = dict(zip(sm.by_path(tx.init(params)), reads.state, strict=True))
        assert per_array["sums/blocks/up/kernel"] == {"blocks/up/kernel"}
        for untouched in ("mini_step", "moved/blocks/up/kernel", "opt_state/0/count"):
            assert per_array[untouched] == frozenset()


L = 3
PROGRAMS = {
    "elementwise": lambda x: jnp.tanh(x) * 2 + x**2,
    "transposed": lambda x: jnp.swapaxes(jnp.moveaxis(x, 0, 2), 0, 1),
    "merged": lambda x: jnp.exp(x).reshape(-1, x.shape[-1]),
    "merged and split": lambda x: x.reshape(-1, x.shape[-1])[:, ::-1].reshape(x.shape),
    "flattened wrongly": lambda x: x.T.reshape(-1),
    "sums": lambda x: jnp.sum(x, axis=1),
    "sum of layers": lambda x: jnp.sum(x, axis=0),
    "mean of all": lambda x: x - jnp.mean(x),
    "batched product": lambda x: jnp.einsum("lij,lkj->lik", x, x),
    "product across": lambda x: jnp.einsum("lij,mij->lm", x, x),
    "free axis": lambda x: jnp.einsum("lij,jk->kli", x, jnp.ones((5, 2))),
    "sorted inside": lambda x: jnp.sort(x, axis=-1),
    "sorted across": lambda x: jnp.sort(x, axis=0),
    "reversed layers": lambda x: x[::-1],
    "rolled": lambda x: jnp.roll(x, 1, axis=0),
    "cumulative": lambda x: jnp.cumsum(x, axis=0),
    "cumulative inside": lambda x: jnp.cumsum(x, axis=1),
    "concatenated": lambda x: jnp.concatenate([x, 2 * x], axis=1),
    "doubled": lambda x: jnp.concatenate([x, x], axis=0),
    "stacked": lambda x: jnp.stack([x, -x], axis=0),
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0))),
    "padded layers": lambda x: jnp.pad(x, ((1, 0), (0, 0), (0, 0))),
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
    "one layer to all": lambda x: jnp.broadcast_to(x[:1], x.shape),
    "map": lambda x: jax.lax.map(lambda y: y / jnp.linalg.norm(y), x),
    "scan": lambda x: jax.lax.scan(lambda c, y: (c + y, c + y), jnp.zeros(x.shape[1:]), x)[1],
    "scan over another axis": lambda x: jax.lax.scan(
        lambda c, y: (c + y, c * y), jnp.ones((L, 5)), jnp.swapaxes(x, 0, 1))[1],
    "loop in place": lambda x: jax.lax.fori_loop(
        0, L, lambda i, y: jax.lax.dynamic_update_index_in_dim(y, jnp.sin(y[i]), i, 0), x),
    "loop out of place": lambda x: jax.lax.fori_loop(
        0, L, lambda i, y: jax.lax.dynamic_update_index_in_dim(y, y[(i + 1) % L], i, 0), x),
    "chosen by all": lambda x: jax.lax.cond(jnp.sum(x) > 0, lambda y: y, lambda y: 2 * y, x),
    "chosen layer by layer": lambda x: jnp.where(jnp.sum(x, (1, 2), keepdims=True) > 0, x, 2 * x),
    "stepped": lambda x: jax.lax.while_loop(
        lambda y: jnp.all(y < 10), lambda y: 2 * jnp.abs(y) + 1, x),
    "remat": jax.checkpoint(lambda x: jnp.sin(x)),
    "constant": lambda x: jnp.ones_like(x),
}  # fmt: skip
# What has to be recognized, and not only must not be got wrong.
ALIGNED = {
    "elementwise", "transposed", "merged", "merged and split", "sums", "batched product",
    "free axis", "sorted inside", "cumulative inside", "concatenated", "stacked", "padded",
    "softmax", "map", "scan over another axis", "loop in place", "chosen layer by layer", "remat",
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_analysis_agrees_with_derivatives(name):
    """Where it sees layers side by side, derivatives across layers are zero."""
    program = PROGRAMS[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(L, 4, 5)), jnp.float32)
    jaxpr = jax.make_jaxpr(program)(x)
    (found,) = reach(jaxpr.jaxpr, [Reach(layers=frozenset("x"), axis=0)], L)
    assert (found.axis is not None) == (name in ALIGNED)
    if name == "constant":
        assert not found.layers
        return
    assert found.layers == {"x"}
    if found.axis is None:
        return
    derivative = np.asarray(jax.jacfwd(program)(x))  # [*result, L, 4, 5]
    by_layer = np.moveaxis(derivative, found.axis, 0)
    by_layer = by_layer.reshape(L, -1, *by_layer.shape[1:])  # an axis may be several merged
    rest = set(range(by_layer.ndim)) - {0, by_layer.ndim - 3}
    blocks = np.abs(by_layer).sum(axis=tuple(rest))
    assert np.all(np.diag(blocks) > 0)
    np.testing.assert_array_equal(blocks[~np.eye(L, dtype=bool)], 0)


def test_derivatives_do_see_the_mixtures():
    """The oracle of the test above: most programs that are not aligned really mix layers."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(L, 4, 5)), jnp.float32)
    mixing = ["rolled", "mean of all", "sorted across", "cumulative", "scan", "loop out of place"]
    for name in mixing:
        derivative = np.asarray(jax.jacfwd(PROGRAMS[name])(x)).reshape(L, 20, L, 20)
        across = np.abs(derivative).sum(axis=(1, 3))[~np.eye(L, dtype=bool)]
        assert np.any(across > 0), name


def test_random_numbers_are_seen():
    jaxpr = jax.make_jaxpr(lambda x: x + jax.random.normal(jax.random.key(0), x.shape))(jnp.ones(3))
    (found,) = reach(jaxpr.jaxpr, [Reach(layers=frozenset("x"), axis=0)], 3)
    assert found.outside == {RANDOM}
