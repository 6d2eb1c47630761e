"""jit, scan, cond, vmap, donation, and what the compiler is given."""

from __future__ import annotations

import conformance_cases as cc
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj

ADAM = cc.relaxed(optax.scale_by_adam())
BY_NAME = {case.name: case for case in cc.CASES}
SOME = [BY_NAME[name] for name in ("keep-svd-input", "rotate-randomized", "staggered-align")]


def assert_same(one, other, atol=1e-5):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=atol)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_whole_loop_in_a_scan(case):
    tx, run = case.make(), cc.run(case)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cc.gradients())

    @cc.jit
    def loop(state):
        def step(state, grads):
            update, state = tx.update(grads, state)
            return state, update

        return jax.lax.scan(step, state, stacked)

    state, updates = loop(run.states[0])
    assert_same(state, run.states[-1], 5e-5)
    assert_same(updates, jax.tree.map(lambda *leaves: jnp.stack(leaves), *run.updates), 5e-5)


@pytest.mark.parametrize("case", SOME[:2], ids=str)
def test_in_a_cond(case):
    tx, run = case.make(), cc.run(case)
    grads = cc.gradients()[0]

    @cc.jit
    def maybe(go, state):
        return jax.lax.cond(
            go, lambda s: tx.update(grads, s), lambda s: (jax.tree.map(jnp.zeros_like, grads), s),
            state,
        )  # fmt: skip

    update, state = maybe(jnp.asarray(True), run.states[0])
    assert_same((update, state), (run.updates[0], run.states[1]))
    update, state = maybe(jnp.asarray(False), run.states[0])
    assert_same(state, run.states[0], 0)


@pytest.mark.parametrize(
    "options",
    [
        {"projector": gj.projectors.svd(), "transport": gj.transport.keep()},
        {"projector": gj.projectors.randomized_svd(), "transport": gj.transport.align()},
        {
            "projector": gj.projectors.gram_eigh(), "transport": gj.transport.rotate(),
            "refresh": gj.refresh.staggered(2),
        },
    ],
    ids=["svd", "randomized", "staggered"],
)  # fmt: skip
def test_vmap_over_models_is_a_loop_over_models(options):
    tx = gj.low_rank_projection(ADAM, 2, **({"refresh": 2, "axes": gj.MatrixAxes()} | options))
    rng = np.random.default_rng(0)
    shapes = {"bias": (4,), "stack": (2, 5, 6), "w": (7, 5)}
    grads = [
        {n: jnp.asarray(rng.normal(size=(3, *s)), jnp.float32) for n, s in shapes.items()}
        for _ in range(4)
    ]
    state = jax.vmap(tx.init)(grads[0])
    batched, single = cc.jit(jax.vmap(lambda g, s: tx.update(g, s))), cc.jit(tx.update)
    states = [tx.init(jax.tree.map(lambda x: x[0], grads[0])) for _ in range(3)]
    for grad in grads:
        updates, state = batched(grad, state)
        for i in range(3):
            one, states[i] = single(jax.tree.map(lambda x, i=i: x[i], grad), states[i])
            assert_same(jax.tree.map(lambda x, i=i: x[i], updates), one, 5e-5)
            assert_same(jax.tree.map(lambda x, i=i: x[i], state), states[i], 5e-5)


@pytest.mark.parametrize("case", [SOME[1], BY_NAME["galore_adamw"]], ids=str)
def test_state_can_be_donated(case):
    tx, params = case.make(), cc.tree(integers=case.integers)
    step = cc.jit(lambda g, s: tx.update(g, s, params), donate_argnums=1)
    state = tx.init(params)
    with case.promotion:
        for grads, expected in zip(cc.gradients(case.integers), cc.run(case).updates, strict=True):
            old, (update, state) = state, step(grads, state)
            assert_same(update, expected, 5e-5)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))


def test_eager_is_jitted():
    tx = gj.low_rank_projection(ADAM, 3, refresh=2)
    grads = [jnp.asarray(g) for g in np.random.default_rng(1).normal(size=(3, 6, 9)).astype("f4")]
    eager, jitted, step = tx.init(grads[0]), tx.init(grads[0]), cc.jit(tx.update)
    for grad in grads:
        one, eager = tx.update(grad, eager)
        two, jitted = step(grad, jitted)
        np.testing.assert_allclose(one, two, atol=1e-5)


# What the compiler is given


def equations(jaxpr, inside_cond=False):
    """All equations with whether they lie inside a conditional."""
    for equation in jaxpr.eqns:
        yield equation, inside_cond
        inner = inside_cond or equation.primitive.name == "cond"
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    yield from equations(part, inner)


def update_jaxpr(shape, **options):
    tx = gj.low_rank_projection(ADAM, 4, axes=gj.MatrixAxes(), **options)
    grads = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(tx.init, grads)
    return jax.make_jaxpr(tx.update)(grads, state).jaxpr


EXPENSIVE = {"svd", "eigh", "cholesky", "qr", "householder_product", "triangular_solve", "sort"}
PROJECTORS = [
    gj.projectors.svd(), gj.projectors.gram_eigh(), gj.projectors.randomized_svd(oversample=2),
    gj.projectors.subspace_iteration(), gj.projectors.random_orthonormal(),
]  # fmt: skip


@pytest.mark.parametrize("projector", PROJECTORS, ids=str)
@pytest.mark.parametrize("layers", [None, 2, 24])
@pytest.mark.parametrize("refresh", [gj.refresh.every(9), gj.refresh.staggered(9)], ids=str)
def test_one_conditional_per_leaf_holds_all_factorizations(projector, layers, refresh):
    shape = (32, 48) if layers is None else (layers, 32, 48)
    found = list(equations(update_jaxpr(shape, projector=projector, refresh=refresh)))
    outside = [e.primitive.name for e, inside in found if not inside]
    inside = {e.primitive.name for e, inside in found if inside}
    assert outside.count("cond") == 1
    assert not EXPENSIVE & set(outside)
    assert EXPENSIVE & inside
    (refresh_cond,) = (e for e, inside in found if e.primitive.name == "cond" and not inside)
    assert refresh_cond.invars[0].aval.shape == ()


@pytest.mark.parametrize("transport", [gj.transport.rotate(), gj.transport.reset()], ids=str)
def test_transport_works_inside_a_conditional_too(transport):
    found = list(equations(update_jaxpr((24, 32, 48), transport=transport)))
    assert [e.primitive.name for e, inside in found if not inside].count("cond") == 1


def test_jaxpr_does_not_grow_with_the_number_of_layers():
    sizes = {len(list(equations(update_jaxpr((layers, 32, 48))))) for layers in (2, 24, 96)}
    assert len(sizes) == 1


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (24, 32, 48)])
@pytest.mark.parametrize("side", ["short", "long"])
def test_no_full_size_transpose_outside_the_refresh(shape, side):
    for equation, inside in equations(update_jaxpr(shape, side=side)):
        if equation.primitive.name == "transpose" and not inside:
            assert equation.outvars[0].aval.size < np.prod(shape)


def test_24_layers_compile_and_run():
    tx = gj.low_rank_projection(ADAM, 4, axes=gj.MatrixAxes())
    grads = jnp.asarray(np.random.default_rng(2).normal(size=(24, 32, 48)), jnp.float32)
    state = tx.init(grads)
    compiled = jax.jit(tx.update).lower(grads, state).compile()
    assert compiled.as_text().count(" conditional(") >= 1
    update, state = compiled(grads, state)
    assert np.all(np.any(np.asarray(update) != 0, axis=(1, 2)))


def test_vmapped_update_is_known_to_lose_the_conditional():
    """Why the count of the table stays unbatched: under vmap of the state, cond is a select."""
    tx = gj.low_rank_projection(ADAM, 4)
    grads = jax.ShapeDtypeStruct((3, 32, 48), jnp.float32)
    state = jax.eval_shape(jax.vmap(tx.init), grads)
    found = equations(jax.make_jaxpr(jax.vmap(tx.update))(grads, state).jaxpr)
    assert any(e.primitive.name in EXPENSIVE for e, inside in found if not inside)
