"""Inside and outside of optax's own wrappers."""

from __future__ import annotations

import conformance_cases as cc
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj

ADAM = cc.relaxed(optax.scale_by_adam())
SHAPES = {"bias": (9,), "embed": (11, 6), "layers": (2, 6, 9), "up": (6, 9)}
AXES = {"layers": gj.MatrixAxes(-2, -1)}
OPTIONS = {"axes": AXES, "projector": gj.projectors.svd()}  # compiles fast


@pytest.fixture(autouse=True)
def promotion_as_optax_needs_it():
    """Schedules, injected numbers, Adam: optax promotes in most of its wrappers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def tree(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


GRADIENTS = [tree(seed) for seed in range(1, 6)]


def lens(inner=ADAM, rank=3, **options):
    return gj.low_rank_projection(inner, rank, **({"refresh": 2} | OPTIONS | options))


def follow(tx, params=None, grads=GRADIENTS, **extra):
    params = tree() if params is None else params
    state = tx.init(params)
    step = cc.jit(lambda g, s, p: tx.update(g, s, p, **extra))
    updates = []
    for grad in grads:
        update, state = step(grad, state, params)
        assert cc.signature(update) == cc.signature(grad)
        updates.append(update)
    return updates, state


def assert_same(one, other, atol=1e-6):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=atol)


PLAIN = None


def plain():
    global PLAIN
    PLAIN = PLAIN or follow(lens())[0]
    return PLAIN


def test_chain_before_and_after():
    scaled, _ = follow(optax.chain(lens(), optax.scale(-0.1)))
    assert_same(scaled, jax.tree.map(lambda u: -0.1 * u, plain()))
    clipped, _ = follow(optax.chain(optax.clip_by_global_norm(1e-3), lens()))
    by_hand = []
    for grad in GRADIENTS:
        factor = 1e-3 / optax.tree.norm(grad)
        by_hand.append(jax.tree.map(lambda g, f=factor: g * f, grad))
    assert_same(clipped, follow(lens(), grads=by_hand)[0], atol=1e-4)


def test_named_chain():
    named, state = follow(optax.named_chain(("galore", lens()), ("rate", optax.scale(2.0))))
    assert_same(named, jax.tree.map(lambda u: 2.0 * u, plain()))
    assert isinstance(state["galore"], gj.LowRankState)


def test_masked():
    mask = {"bias": False, "embed": True, "layers": True, "up": False}
    updates, state = follow(optax.masked(lens(), mask))
    for update, grad, expected in zip(updates, GRADIENTS, plain(), strict=True):
        assert_same(update["layers"], expected["layers"])
        assert_same(update["embed"], expected["embed"])
        assert_same((update["bias"], update["up"]), (grad["bias"], grad["up"]))
    assert set(cc.bases(state)) == {"layers"}


def test_masked_inside():
    mask = {"bias": True, "embed": True, "layers": False, "up": True}
    updates, _ = follow(lens(optax.masked(ADAM, mask), transport=gj.transport.rotate()))
    expected, _ = follow(lens(transport=gj.transport.rotate()))
    raw, _ = follow(lens(optax.identity()))
    for update, one, two in zip(updates, expected, raw, strict=True):
        assert_same(update["up"], one["up"], 1e-5)
        assert_same(update["layers"], two["layers"], 1e-5)


def test_partition_with_two_lenses():
    tx = optax.partition(
        {"a": lens(), "b": lens(optax.trace(0.9), rank=2), "c": optax.sgd(0.5)},
        {"bias": "c", "embed": "c", "layers": "a", "up": "b"},
    )
    updates, state = follow(tx)
    other, _ = follow(lens(optax.trace(0.9), rank=2))
    for update, grad, one, two in zip(updates, GRADIENTS, plain(), other, strict=True):
        assert_same(update["layers"], one["layers"])
        assert_same(update["up"], two["up"])
        assert_same(update["bias"], -0.5 * grad["bias"])
    assert [found.config.rank for found in cc.lenses(state)] == [3, 2]


def test_apply_if_finite():
    tx = optax.apply_if_finite(lens(), max_consecutive_errors=3)
    bad = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), GRADIENTS[0])
    updates, state = follow(tx, grads=[GRADIENTS[0], bad, *GRADIENTS[1:]])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates[1]))
    assert_same([updates[0], *updates[2:]], plain())
    assert int(cc.lenses(state)[0].count) == len(GRADIENTS)


def test_multi_steps_outside():
    tx = optax.MultiSteps(lens(), every_k_schedule=2).gradient_transformation()
    twice = [grad for grad in GRADIENTS for _ in range(2)]
    updates, _ = follow(tx, grads=twice)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates[::2]))
    assert_same(updates[1::2], plain(), 1e-5)


def test_multi_steps_inside():
    """R is averaged over the two steps of one basis."""
    inner = optax.MultiSteps(optax.identity(), 2).gradient_transformation()
    updates, _ = follow(lens(inner))
    raw, _ = follow(lens(optax.identity()))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates[::2]))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, raw[0], raw[1])
    assert_same(updates[1], mean, 1e-5)


def listener():
    def update(updates, state, params=None, *, loudness, **extra):
        del params, extra
        return jax.tree.map(lambda u: loudness * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def test_extra_args_reach_the_inner():
    raw, _ = follow(lens(optax.identity()))
    for wrap in (lambda tx: tx, lambda tx: optax.chain(tx, optax.identity())):
        loud, _ = follow(wrap(lens(listener())), loudness=3.0, unheard_of=1)
        assert_same(loud, jax.tree.map(lambda u: 3 * u, raw), 1e-5)
    loud, _ = follow(gj.galore(1.0, 3, 2, base_optimizer=listener(), **OPTIONS), loudness=3.0)
    assert_same(loud, jax.tree.map(lambda u: -3 * u, raw), 1e-5)


# inject_hyperparams

ALIASES = [gj.galore, gj.galore_adamw, gj.galore_lion, gj.galore_sgd, gj.galore_adafactor]
COMMON = {"rank": 3, "update_proj_gap": 2} | OPTIONS


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.__name__)
def test_injected_numbers_are_the_numbers(alias):
    numbers = {"learning_rate": 0.1, "scale": 0.5, "weight_decay": 0.01}
    inject = optax.inject_hyperparams(alias, static_args=gj.STATIC_ARGS)
    updates, state = follow(inject(**numbers, **COMMON))
    assert_same(updates, follow(alias(**numbers, **COMMON))[0], 1e-5)
    assert set(numbers) <= set(state.hyperparams)
    assert not set(gj.STATIC_ARGS) & set(state.hyperparams)


def test_injected_numbers_can_be_set():
    tx = optax.inject_hyperparams(gj.galore_adamw, static_args=gj.STATIC_ARGS)(0.1, **COMMON)
    params, state = tree(), tx.init(tree())
    state = optax.tree.set(state, learning_rate=jnp.asarray(0.0))
    update, state = tx.update(GRADIENTS[0], state, params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(update))
    state = optax.tree.set(state, learning_rate=jnp.asarray(1.0), scale=jnp.asarray(0.0))
    update, state = tx.update(GRADIENTS[1], state, params)
    assert not np.any(update["up"]) and np.any(update["bias"])
    assert float(optax.tree.get(state, "learning_rate")) == 1.0


def test_injected_schedules_are_the_schedules():
    def rate(count):
        return 0.1 / (1 + count)

    def scale(count):
        return 0.5 + count

    schedules = {"learning_rate": rate, "scale": scale}
    inject = optax.inject_hyperparams(gj.galore_adamw, static_args=gj.STATIC_ARGS)
    injected, state = follow(inject(**schedules, **COMMON))
    assert_same(injected, follow(gj.galore_adamw(**schedules, **COMMON))[0], 1e-5)
    assert float(state.hyperparams["scale"]) == pytest.approx(scale(len(GRADIENTS) - 1))


def test_static_callables_are_not_taken_for_schedules():
    inject = optax.inject_hyperparams(gj.galore_adamw, static_args=gj.STATIC_ARGS)
    options = {
        "rank": lambda path, leaf: 2,
        "targets": gj.all_matrices,
        "mask": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        "axes": lambda params: {name: gj.MatrixAxes() if leaf.ndim > 1 else None
                                for name, leaf in params.items()},
        "weight_decay": 0.1,
        "update_proj_gap": gj.refresh.staggered(2),
    }  # fmt: skip
    updates, state = follow(inject(0.1, **options))
    assert_same(updates, follow(gj.galore_adamw(0.1, **options))[0], 1e-5)
    assert {basis.shape[-1] for basis in cc.bases(state).values()} == {2}
    assert "embed" in cc.bases(state)


def test_injected_rank_is_refused_with_the_remedy():
    tx = optax.inject_hyperparams(gj.galore_adamw)(0.1, rank=3, axes=None)
    with pytest.raises(TypeError, match=r"rank.*STATIC_ARGS"):
        tx.init(tree())


def test_injected_gap_is_refused_with_the_remedy():
    static = tuple(name for name in gj.STATIC_ARGS if name != "update_proj_gap")
    tx = optax.inject_hyperparams(gj.galore_adamw, static_args=static)(0.1, rank=3)
    with pytest.raises(TypeError, match=r"gap.*STATIC_ARGS"):
        tx.init(tree())


def test_dimension_numbers_of_optax_can_be_injected_too():
    numbers = {"bias": None, "embed": None, "layers": None, "up": gj.MatrixAxes()}
    inject = optax.inject_hyperparams(
        gj.galore, static_args=(*gj.STATIC_ARGS, "weight_dimension_numbers", "base_optimizer")
    )
    options = {"rank": 3, "update_proj_gap": 2, "weight_dimension_numbers": lambda p: numbers}
    injected, state = follow(inject(0.1, **options))
    assert_same(injected, follow(gj.galore(0.1, **options))[0], 1e-5)
    assert set(cc.bases(state)) == {"up"}


# tree.map_params, get, set


@pytest.mark.parametrize("case", cc.CASES, ids=str)
def test_map_params_without_rest_trees(case):
    tx, state = case.make(), cc.run(case).states[-1]
    mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert_same(mapped, state, 0)
    touched = optax.tree.map_params(
        tx, lambda leaf: "parameter", state, transform_non_params=lambda leaf: "other"
    )
    for lens_state in cc.lenses(touched):
        assert lens_state.count == "other"
        bases = jax.tree.leaves(lens_state.projectors)
        assert bases and set(bases) == {"parameter"}
        inner = jax.tree.leaves(lens_state.inner_state)
        # There are no moments, or they may be codes, which are not like parameters.
        others_only = case.name in ("galore_sgd", "q_galore") or "8bit" in case.name
        assert ("parameter" in inner) != others_only


@pytest.mark.parametrize(
    "make",
    [
        lambda: lens(),
        lambda: lens(refresh=gj.refresh.staggered(2), transport=gj.transport.rotate()),
        lambda: gj.galore_adamw(0.1, 3, axes=AXES, weight_decay=0.1),
        lambda: gj.galore_lion(0.1, 3, axes=AXES, codec=gj.codecs.cast("bfloat16")),
        lambda: optax.chain(optax.clip(1.0), lens(optax.trace(0.9))),
    ],
)
def test_map_params_with_rest_trees(make):
    tx, params = make(), tree()
    state = tx.init(params)
    names = {name: name for name in params}
    specs = {name: jax.sharding.PartitionSpec(name) for name in params}
    seen = []

    def note(leaf, name, spec):
        assert spec == jax.sharding.PartitionSpec(name)
        seen.append(name)
        return leaf

    mapped = optax.tree.map_params(
        tx, note, state, names, specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)
    )
    assert_same(mapped, state, 0)
    assert seen.count("up") == seen.count("bias") >= 2
    (lens_state,) = cc.lenses(optax.tree.map_params(tx, lambda leaf, name: name, state, names))
    assert lens_state.projectors == names
    # Flags are no parameters: one array of them may be about several leaves.
    flags = cc.lenses(optax.tree.map_params(tx, lambda x: None, state))[0].refresh_state
    assert_same(flags, cc.lenses(state)[0].refresh_state, 0)


AXES_TREE = {"block": {"up": gj.MatrixAxes(), "bias": None}}


@pytest.mark.parametrize("rule", [AXES_TREE, lambda params: AXES_TREE], ids=["tree", "callable"])
@pytest.mark.parametrize("alias", [gj.galore_adamw, gj.galore_adafactor])
def test_map_params_where_axes_are_a_tree(alias, rule):
    params = {"block": {"up": jnp.ones((6, 9)), "bias": jnp.ones(9)}}
    tx = alias(0.1, 3, axes=rule)
    state = tx.init(params)
    assert_same(optax.tree.map_params(tx, lambda leaf: leaf, state), state, 0)


@pytest.mark.xfail(strict=True, reason="the inner state holds a MaskedNode at an integer leaf")
def test_map_params_with_rest_trees_and_an_integer_leaf():
    params = {"w": jnp.ones((6, 9)), "n": jnp.asarray(3)}
    tx = gj.low_rank_projection(ADAM, 3)
    optax.tree.map_params(tx, lambda leaf, name: leaf, tx.init(params), {"w": "w", "n": "n"})


def test_tree_get_and_set():
    tx = gj.galore_adamw(0.1, 3, axes=AXES)
    state = tx.init(tree())
    assert optax.tree.get(state, "projectors")["up"].shape == (6, 3)
    assert optax.tree.get(state, "mu")["up"].shape == (9, 3)
    changed = optax.tree.set(state, projectors=jax.tree.map(jnp.zeros_like, state[0].projectors))
    assert not np.any(changed[0].projectors["up"])
    assert jax.tree.structure(changed) == jax.tree.structure(state)


def test_weight_decay_is_decoupled_unscaled_and_masked():
    params = tree()
    mask = {"bias": False, "embed": True, "layers": True, "up": True}
    options = {"rank": 3, "update_proj_gap": 2, "scale": 0.5} | OPTIONS
    bare, _ = follow(gj.galore_adamw(0.1, **options))
    for given in (mask, lambda p: mask):
        decayed, _ = follow(gj.galore_adamw(0.1, weight_decay=0.2, mask=given, **options))
        for one, other in zip(bare, decayed, strict=True):
            for name in params:
                expected = one[name] - (0.1 * 0.2 * params[name] if mask[name] else 0)
                np.testing.assert_allclose(other[name], expected, atol=1e-6)


def test_scale_multiplies_projected_leaves_only():
    raw, _ = follow(lens(scale=1.0))
    half, _ = follow(lens(scale=0.5))
    for one, other in zip(raw, half, strict=True):
        for name, factor in {"bias": 1, "embed": 1, "layers": 0.5, "up": 0.5}.items():
            np.testing.assert_allclose(other[name], factor * one[name], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.__name__)
def test_dtype_of_the_parameters_is_kept(alias, dtype):
    with jax.enable_x64(dtype == "float64"):
        grads = [jax.tree.map(lambda g: jnp.asarray(np.asarray(g), dtype), g) for g in GRADIENTS]
        params = jax.tree.map(lambda p: p.astype(dtype), grads[0])
        tx = alias(0.1, **COMMON, weight_decay=0.1)
        updates, state = follow(tx, params, grads[:3])
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))
        assert cc.signature(state) == cc.signature(tx.init(params))


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.__name__)
def test_moments_are_kept_in_the_state_dtype(alias):
    params = tree(dtype=jnp.bfloat16)
    state = alias(0.1, **COMMON).init(params)
    for leaf in jax.tree.leaves(state):
        # Places are fractions of 2^32.
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.uint32, jnp.bool_)


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.__name__)
def test_zero_gradients_in_half_precision(alias):
    params = tree(dtype=jnp.float16)
    tx = alias(0.1, **COMMON)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(updates))


def test_inner_that_needs_parameters_is_refused():
    with pytest.raises(ValueError, match="params"):
        lens(optax.adamw(1e-3)).init(tree())


def test_update_needs_no_parameters_without_decay():
    tx = gj.galore_adamw(0.1, **COMMON)
    update, _ = tx.update(GRADIENTS[0], tx.init(tree()))
    assert np.any(update["up"])
