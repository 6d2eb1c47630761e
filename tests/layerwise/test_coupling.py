"""Transformations that need more than one block's gradient are refused by name; others are not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stacked_model as sm

import galore_jax as gj
from galore_jax import layerwise
from galore_jax.layerwise import coupling
from galore_jax.layerwise.slices import Layer, block_leaves, layer_axes
from galore_jax.leaves import Leaves
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


def scaled_by_norm():
    def update(updates, state, params=None, *, grad_norm, **extra_args):
        return optax.tree.scale(grad_norm, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def with_noise(knows_layer):
    """Noise in the blocks, from a key that knows which of them it is for, or does not."""

    def update(updates, state, params=None, *, layer=0, **extra_args):
        key = jax.random.fold_in(jax.random.key(0), layer if knows_layer else 0)
        noisy = jax.tree.map(lambda x: x + jax.random.normal(key, x.shape), updates["blocks"])
        return {**updates, "blocks": noisy}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


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
    "a stack of vectors as a matrix": (
        gj.galore_sgd(1e-2, rank=3, targets=gj.all_matrices),
        "'blocks/norm/scale'",
    ),
    "noise": (
        optax.chain(optax.add_noise(0.1, 0.5, 0), GALORE),
        "update of 'blocks/down/kernel' depends on random numbers.*the extra argument `layer`",
    ),
    "a count of the whole stack": (
        optax.chain(optax.zero_nans(), GALORE),
        "the state '0/found_nan/blocks/down/kernel' depends on 'blocks/down/kernel', which is in",
    ),
    "the norm of this step": (
        scaled_by_norm(),
        "update of 'blocks/down/kernel' depends on the global norm of this step",
    ),
    "parameters of all blocks": (
        optax.stateless(lambda updates, params: {
            **updates, "norm": jax.tree.map(
                lambda x: x * optax.tree.norm(params["blocks"]), updates["norm"])}),
        "update of 'norm/scale' depends on the parameter 'blocks/down/kernel' .*in the blocks",
    ),
    "state of all blocks": (
        optax.GradientTransformation(
            lambda params: params,
            lambda updates, state, params=None: (
                jax.tree.map(lambda x: x * optax.tree.norm(state), updates), state)),
        "update of 'embed/embedding' depends on the state 'blocks/down/kernel'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COUPLED)
def test_refused_by_name(name):
    tx, message = COUPLED[name]
    with pytest.raises(ValueError, match=message) as caught:
        trace(tx)
    if name != "a stack of vectors as a matrix":
        for remedy in ("clip_norm=", "clip_by_previous_norm", "skip_nonfinite"):
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
    "clip_by_block_rms": optax.chain(optax.clip_by_block_rms(1.0), GALORE),
    "trust ratio": optax.lamb(1e-3),
    "Adafactor's clip": gj.galore_adafactor(1e-2, **LENS),
    "norm of the blocks": optax.chain(
        optax.masked(optax.clip_by_global_norm(1.0), ONLY_BLOCKS), GALORE),
    "noise that knows the layer": with_noise(True),
    "noise outside": optax.masked(optax.add_noise(0.1, 0.5, 0), NOT_BLOCKS),
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


@pytest.mark.parametrize("name", ["trust ratio", "clip by norm"])
def test_a_statistic_of_a_leaf_is_that_of_each_layer(name):
    """As if layers were leaves of their own."""
    tx = {
        "trust ratio": optax.lamb(1e-2, weight_decay=0.1),
        "clip by norm": optax.chain(optax.clip_by_block_rms(1e-3), optax.sgd(1e-1)),
    }[name]
    params, tokens = sm.initial(), sm.batches(1)[0]
    gradients = jax.grad(sm.loss_fn)(params, tokens)

    def apart(tree):
        return {
            **tree,
            "blocks": [jax.tree.map(lambda x, i=i: x[i], tree["blocks"]) for i in range(sm.LAYERS)],
        }

    updates, _ = tx.update(apart(gradients), tx.init(apart(params)), apart(params))
    expected = optax.apply_updates(apart(params), updates)
    together, _ = tx.update(gradients, tx.init(params), params)
    assert sm.distance(optax.apply_updates(params, together), params) > 1e-5
    step = jax.jit(layerwise.train_step(*sm.MODEL, tx))
    found, _, _ = step(params, tx.init(params), tokens)
    assert sm.distance(apart(found), expected) < 1e-6


def reads_of(tx, params=None):
    """What the update of one layer reads."""
    params = sm.initial() if params is None else params
    whole, inside = Layer(params, tx.init(params)), block_leaves(params, "blocks")
    axes = layer_axes(tx, whole, "blocks", inside)
    tx, here = optax.with_extra_args_support(tx), axes.slice(whole, 0)
    traced = jax.jit(
        lambda layer, norm, *trees: tx.update(*trees, layer=layer, grad_norm=norm)
    ).trace(jnp.int32(0), jnp.float32(0), here.params, here.opt_state, here.params)
    return coupling.reads_of(traced, here, here.params, axes, inside)


def named(numbers, params=None):
    paths = Leaves.of(sm.initial() if params is None else params).paths
    return {paths[number] for number in numbers}


def test_what_is_read_by_the_update_of_each_leaf():
    params = sm.initial()
    tx = optax.chain(
        optax.masked(optax.clip_by_global_norm(1.0), NOT_BLOCKS),
        optax.scale_by_adam(),
        optax.scale_by_learning_rate(optax.linear_schedule(1.0, 0.0, 10)),
    )
    reads, outside = reads_of(tx), {"embed/embedding", "norm/scale", "lm_head/kernel"}
    updates = dict(zip(Leaves.of(params).paths, map(named, reads.updates), strict=True))
    assert updates["lm_head/kernel"] == outside
    assert updates["blocks/up/kernel"] == {"blocks/up/kernel"}
    per_array = dict(zip(sm.by_path(tx.init(params)), map(named, reads.state), strict=True))
    assert per_array["1/mu/embed/embedding"] == outside
    assert per_array["1/nu/blocks/down/kernel"] == {"blocks/down/kernel"}
    assert per_array["1/count"] == per_array["2/count"] == set()
    assert not any(reads.dates)


@pytest.mark.parametrize("windows", [False, True])
def test_bases_go_with_their_moments(windows):
    """All that a lens keeps of a leaf is made from its gradient; the dates of bases are known."""
    tx = gj.galore_adamw(1e-2, targets="kernel|embedding", **LENS)
    tx = gj.accumulate(tx, 2) if windows else tx
    params, lens = sm.initial(), "opt_state/0" if windows else "0"
    reads, paths = reads_of(tx), list(sm.by_path(tx.init(params)))
    read = dict(zip(paths, map(named, reads.state), strict=True))
    dates = {path for path, date in zip(paths, reads.dates, strict=True) if date}
    for name in ("blocks/up/kernel", "lm_head/kernel"):
        kind = name.replace("/", ".")
        own = [f"{lens}/projectors/{name}", f"{lens}/inner_state/mu/{name}"]
        own += [f"{lens}/refresh_state/{field}/{kind}" for field in ("due", "refreshes", "overlap")]
        own += [f"{part}/{name}" for part in ("sums", "moved", "projectors") if windows]
        assert all(name in read[path] for path in own)
        assert f"{lens}/refresh_state/due/{kind}" in dates
        assert not windows or f"moved/{name}" in dates
    assert read[f"{lens}/count"] == set()
    assert not any("projectors" in path or "inner_state" in path for path in dates)


def test_leaves_of_one_name_are_told_apart():
    """A key may hold what separates keys."""
    params = sm.initial() | {"norm/scale": jnp.ones(sm.WIDTH)}
    tx = optax.chain(optax.scale_by_adam(), optax.scale(-1e-2))
    paths = Leaves.of(params).paths
    assert {"['norm']['scale']", "['norm/scale']"} <= set(paths)
    assert reads_of(tx, params).updates == [frozenset([n]) for n in range(len(paths))]

    def head(params, x, tokens):
        scale = params["norm"]["scale"] * params["norm/scale"]
        return sm.head({**params, "norm": {"scale": scale}}, x, tokens)

    def loss(params, tokens):
        x, _ = jax.lax.scan(
            lambda x, layer: (sm.block(layer, x), None), sm.embed(params, tokens), params["blocks"]
        )
        return head(params, x, tokens)

    data = sm.batches(3)
    expected, _, _ = sm.run(sm.ordinary_step(tx, loss), params, tx.init(params), data)
    step = layerwise.train_step(sm.embed, sm.block, head, tx)
    found, _, _ = sm.run(step, params, tx.init(params), data)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-5), found, expected))


X = jnp.ones(3)
PROGRAMS = {
    "arithmetic": (lambda a, b: (a + 1, b * 2, a * b), ["a", "b", "ab"]),
    "multiplied by zero": (lambda a, b: (0 * a, b), ["a", "b"]),  # it may be a NaN
    "chosen": (lambda a, b: (jax.lax.cond(a[0] > 0, lambda: b, lambda: 2 * b),), ["ab"]),
    "branches": (
        lambda a, b: jax.lax.cond(True, lambda: (a, b), lambda: (2 * a, X)), ["a", "b"]),
    "inside functions": (
        lambda a, b: jax.jit(jax.checkpoint(lambda a, b: (jnp.sin(a), jax.nn.relu(b))))(a, b),
        ["a", "b"]),
    "a loop mixes": (
        lambda a, b: jax.lax.fori_loop(0, 3, lambda _, c: (c[0] + 1, c[1] * 2), (a, b)),
        ["ab", "ab"]),
    "a scan mixes": (lambda a, b: jax.lax.scan(lambda c, x: (c + x, x), X[0], a * b), ["ab", "ab"]),
    "carried on": (  # b reaches the first result in the second round only
        lambda a, b: jax.lax.scan(lambda c, _: ((c[1], b), None), (a, a), length=2)[0],
        ["ab", "ab"]),
    "barrier": (lambda a, b: jax.lax.optimization_barrier((a, b)), ["a", "b"]),
    "constants": (lambda a, b: (X, 1.0), ["", ""]),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_dependence(name):
    program, expected = PROGRAMS[name]
    jaxpr = jax.make_jaxpr(program)(X, X).jaxpr
    found = coupling.dependence(jaxpr, [frozenset([0]), frozenset([1])])
    assert ["".join("ab"[n] for n in sorted(numbers)) for numbers in found] == expected
