"""The numbers of `optax.contrib.galore`, step by step and across refreshes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj

# Tests compile far longer than they run.
FAST = {"xla_backend_optimization_level": 0}

Theirs = optax.contrib.GaLoreDimensionNumbers
STEPS, GAP = 50, 10
SHAPES = {"bias": (7,), "square": (8, 8), "tall": (12, 7), "wide": (6, 10)}
GRADIENTS = {"scale": 0.25, "weight_decay": 0.1, "rank": 3, "update_proj_gap": GAP}
AS_OPTAX = {
    "side": "long",
    "projector": gj.projectors.svd(),
    "transport": gj.transport.keep(),
    "targets": gj.all_matrices,
}


@pytest.fixture(autouse=True)
def promotion_as_optax_needs_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


def well_separated(rng, shape):
    """Singular values well apart, so that fp32 vectors are determined to 1e-6."""
    kernel = shape if len(shape) == 2 else (shape[0], int(np.prod(shape[1:])))
    u, _, vt = np.linalg.svd(rng.normal(size=kernel), full_matrices=False)
    values = 1.0 + np.arange(min(kernel))[::-1]
    return (u * values @ vt).reshape(shape)


def follow(tx, params, feedback=0.0):
    """Weights after every step; the gradient may depend on the weights."""
    rng = np.random.default_rng(7)
    state = tx.init(params)
    step = jax.jit(tx.update, compiler_options=FAST)
    weights = []
    for _ in range(STEPS):
        grads = {
            name: jnp.asarray(
                well_separated(rng, leaf.shape) if leaf.ndim > 1 else rng.normal(size=leaf.shape),
                jnp.float32,
            )
            + feedback * leaf
            for name, leaf in params.items()
        }
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        weights.append(params)
    return weights


def start(shapes):
    rng = np.random.default_rng(3)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        for name, leaf in other.items():
            np.testing.assert_allclose(one[name], leaf, atol=1e-5, err_msg=name)


def test_plain_parameters():
    params = start(SHAPES)
    ours = follow(gj.galore(1e-2, **GRADIENTS, **AS_OPTAX), params)
    theirs = follow(optax.contrib.galore(1e-2, **GRADIENTS), params)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "change",
    [
        {"side": "short"},
        {"update_proj_gap": gj.refresh.staggered(GAP)},
        {"transport": gj.transport.align()},
        {"projector": gj.projectors.svd(signs="positive")},
    ],
    ids=str,
)
def test_every_option_of_the_parity_matters(change):
    params = start(SHAPES)
    ours = follow(gj.galore(1e-2, **(GRADIENTS | AS_OPTAX | change)), params)
    theirs = follow(optax.contrib.galore(1e-2, **GRADIENTS), params)
    with pytest.raises(AssertionError):
        assert_same(ours, theirs)


@pytest.mark.parametrize(
    "inner", [optax.scale_by_lion(), optax.trace(0.9), optax.identity()], ids=["lion", "trace", "-"]
)
def test_another_base_optimizer_mask_and_gradients_of_the_weights(inner):
    params = start(SHAPES)
    options = GRADIENTS | {
        "base_optimizer": inner, "mask": {name: name != "tall" for name in SHAPES},
    }  # fmt: skip
    feedback = 0.0 if "lion" in str(inner.init) else 0.05
    ours = follow(gj.galore(1e-3, **options, **AS_OPTAX), params, feedback)
    theirs = follow(optax.contrib.galore(1e-3, **options), params, feedback)
    assert_same(ours, theirs)


LONE = Theirs(0, (1, 2))
TREE = {"attention": LONE, "bias": None, "skipped": None, "tall": Theirs()}


@pytest.mark.parametrize(
    ("shapes", "numbers"),
    [
        pytest.param(SHAPES, None, id="None"),
        pytest.param({"a": (10, 2, 4), "b": (6, 3, 4), "bias": (5,)}, LONE, id="lone"),
        pytest.param({"a": (6, 10), "bias": (5,)}, Theirs(1, 0), id="lone, transposed"),
        pytest.param(
            {"attention": (10, 2, 4), "bias": (5,), "skipped": (6, 8), "tall": (12, 7)},
            TREE,
            id="tree with None",
        ),
        pytest.param(
            {"attention": (10, 2, 4), "bias": (5,), "skipped": (6, 8), "tall": (12, 7)},
            lambda params: {name: TREE[name] for name in params},
            id="callable",
        ),
    ],
)
def test_weight_dimension_numbers(shapes, numbers):
    params = start(shapes)
    options = GRADIENTS | {"weight_dimension_numbers": numbers}
    ours_tx = gj.galore(1e-2, **options, **AS_OPTAX)
    projected = {
        name for name, basis in ours_tx.init(params)[0].projectors.items() if basis.ndim > 0
    }
    assert projected == {
        name
        for name, basis in optax.contrib.galore(1e-2, **options).init(params)[0].projector.items()
        if basis.size > 0
    }
    assert projected
    assert_same(follow(ours_tx, params), follow(optax.contrib.galore(1e-2, **options), params))


def test_our_axes_and_theirs_are_the_same_thing():
    params = start({"attention": (10, 2, 4), "bias": (5,)})
    one, other = (
        follow(gj.galore(1e-2, **GRADIENTS, **AS_OPTAX, **axes), params)
        for axes in (
            {"weight_dimension_numbers": {"attention": LONE, "bias": None}},
            {"axes": {"attention": gj.MatrixAxes(0, (1, 2))}},
        )
    )
    assert_same(one, other)
