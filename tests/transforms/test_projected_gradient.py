"""A gradient that arrives projected does what the gradient itself would have done."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj
from galore_jax import projectors, transport
from galore_jax.transforms.state import low_rank_states
from galore_jax.views import ProjectedGradient

PARAMS = {
    "w": jnp.zeros((10, 6)),
    "stack": jnp.zeros((3, 6, 8)),
    "b": jnp.zeros((6,)),
}
AXES = {"stack": gj.MatrixAxes((2,), 1)}
TREE = AXES | {"w": gj.MatrixAxes(), "b": None}
STEPS, GAP = 6, 2


def stream(params=PARAMS, steps=STEPS):
    rng = np.random.default_rng(0)
    base = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
    for _ in range(steps):
        yield jax.tree.map(
            lambda b: jnp.asarray(b + 0.4 * rng.normal(size=b.shape), jnp.float32), base
        )


def lens(relaxed, transport, **options):
    defaults = {"projector": projectors.svd(), "refresh": GAP, "axes": AXES}
    inner = relaxed(optax.scale_by_adam(eps=1e-2))
    return gj.low_rank_projection(inner, 2, transport=transport, **(defaults | options))


def taken(gradient, state, turn=None):
    """The gradient tree with projected leaves, in the bases of `state`, turned by `turn`."""
    views = {plan.path: plan.view for plan in gj.views.leaf_plan(state.config, gradient)}

    def take(name, leaf):
        if views[name] is None:
            return leaf
        basis = state.projectors[name] if turn is None else state.projectors[name] @ turn
        return ProjectedGradient(views[name].project(leaf, basis), basis)

    return {name: take(name, leaf) for name, leaf in gradient.items()}


def agree(ours, theirs, atol):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=atol)


TRANSPORTS = [
    transport.align(), transport.keep(), transport.reset(), transport.reset(second="mean"),
    transport.rotate(),
]  # fmt: skip


CASES = [(move, "short") for move in TRANSPORTS] + [
    (TRANSPORTS[0], "long"),
    (TRANSPORTS[4], "long"),
]


@pytest.mark.parametrize("move, side", CASES, ids=str)
@pytest.mark.sampled(2)
def test_equals_the_gradient_itself(relaxed, move, side):
    tx = lens(relaxed, move, side=side)
    update = jax.jit(tx.update)
    full = low = tx.init(PARAMS)
    for step, gradient in enumerate(stream()):
        expected, full = update(gradient, full)
        given = taken(gradient, full if step % GAP == 0 else low)
        assert isinstance(given["stack"], ProjectedGradient)
        updates, low = update(given, low, PARAMS)
        agree(updates, expected, atol=1e-4)
        agree(low.projectors, full.projectors, atol=1e-5)
        agree(low.inner_state, full.inner_state, atol=1e-4)
        agree(low.refresh_state.overlap, full.refresh_state.overlap, atol=1e-5)  # as bases agree
        decisions = [s.refresh_state._replace(overlap=()) for s in (low, full)]
        agree(*decisions, atol=0)
        assert low.refresh_state.refreshes["w"] == step // GAP + 1


def test_align_takes_any_basis_of_the_subspace(relaxed):
    """The lens turns what it is given, and the gradient with it."""
    tx = lens(relaxed, transport.align())
    update = jax.jit(tx.update)
    full = low = tx.init(PARAMS)
    angle = np.float32(0.7)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [-np.sin(angle), -np.cos(angle)]])
    for step, gradient in enumerate(stream()):
        expected, full = update(gradient, full)
        refreshed = step % GAP == 0
        given = taken(gradient, full if refreshed else low, turn if refreshed else None)
        updates, low = update(given, low, PARAMS)
        agree(updates, expected, atol=1e-4)
        agree(low.projectors, full.projectors, atol=1e-5)


def test_some_leaves_projected_and_some_not(relaxed):
    tx = lens(relaxed, transport.rotate())
    update = jax.jit(tx.update)
    full = low = tx.init(PARAMS)
    for gradient in stream(steps=3):
        expected, full = update(gradient, full)
        mixed = taken(gradient, full) | {"stack": gradient["stack"]}
        updates, low = update(mixed, low, PARAMS)
        agree(updates, expected, atol=1e-4)


def test_only_the_matrices_whose_basis_differs_count_as_refreshed(relaxed):
    tx = lens(relaxed, transport.reset())
    gradient, later = stream(steps=2)
    _, first = jax.jit(tx.update)(gradient, tx.init(PARAMS))
    given = taken(later, first)
    fresh = given["stack"].basis.at[1].set(jnp.eye(6, 2)[::-1])
    given["stack"] = ProjectedGradient(given["stack"].value, fresh)
    _, second = jax.jit(tx.update)(given, first, PARAMS)
    np.testing.assert_array_equal(second.refresh_state.refreshes["stack"], [1, 2, 1])
    np.testing.assert_array_equal(second.projectors["stack"][1], fresh[1])
    np.testing.assert_array_equal(second.projectors["stack"][0], first.projectors["stack"][0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16])
def test_values_of_other_dtypes(relaxed, dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    tx = lens(relaxed, transport.align())
    gradient = next(stream())
    _, full = jax.jit(tx.update)(gradient, tx.init(PARAMS))
    given = {
        name: ProjectedGradient(leaf.value.astype(dtype), leaf.basis)
        if isinstance(leaf, ProjectedGradient)
        else leaf.astype(dtype)
        for name, leaf in taken(gradient, full).items()
    }
    updates, state = jax.jit(tx.update)(given, tx.init(params), params)
    assert all(update.dtype == dtype for update in updates.values())
    assert state.inner_state.mu["w"].dtype == jnp.float32


def first_given(relaxed, **options):
    tx = lens(relaxed, transport.align(), **options)
    gradient = next(stream())
    return tx, gradient, taken(gradient, jax.jit(tx.update)(gradient, tx.init(PARAMS))[1])


def test_params_are_required(relaxed):
    tx, _, given = first_given(relaxed)
    with pytest.raises(ValueError, match="`params`"):
        tx.update(given, tx.init(PARAMS))


@pytest.mark.parametrize("name", ["w", "stack"])
@pytest.mark.parametrize("part", ["value", "basis"])
def test_wrong_shapes_are_named(relaxed, name, part):
    tx, _, given = first_given(relaxed)
    parts = {"value": given[name].value, "basis": given[name].basis}
    parts[part] = parts[part][..., :1]
    bad = given | {name: ProjectedGradient(**parts)}
    with pytest.raises(ValueError) as error:
        tx.update(bad, tx.init(PARAMS), PARAMS)
    assert f"'{name}'" in str(error.value) and str(parts[part].shape) in str(error.value)


def test_a_leaf_that_is_not_projected_is_named(relaxed):
    tx, gradient, given = first_given(relaxed)
    bad = given | {"b": ProjectedGradient(gradient["b"], jnp.eye(6, 2))}
    with pytest.raises((ValueError, TypeError), match="'b'"):
        tx.update(bad, tx.init(PARAMS), PARAMS)


def test_a_basis_that_is_not_finite_is_not_adopted(relaxed):
    tx, _, given = first_given(relaxed)
    bad = given | {"w": ProjectedGradient(given["w"].value, given["w"].basis.at[0, 0].set(jnp.nan))}
    start = tx.init(PARAMS)
    _, state = jax.jit(tx.update)(bad, start, PARAMS)
    np.testing.assert_array_equal(state.projectors["w"], start.projectors["w"])


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "make",
    [gj.galore_adamw, gj.galore_adafactor],
    ids=lambda make: make.__name__,
)
@pytest.mark.parametrize(
    "axes", [AXES, TREE, lambda params: TREE], ids=["dict", "tree", "callable"]
)
def test_aliases_take_them_too(make, axes):
    tx = make(1e-2, 2, update_proj_gap=GAP, axes=axes, weight_decay=0.1)
    update = jax.jit(tx.update)
    full = low = tx.init(PARAMS)

    for gradient in stream(steps=2):
        expected, full = update(gradient, full, PARAMS)
        *_, projecting = low_rank_states(full)  # that of Adafactor's other leaves comes first
        given = taken(gradient, projecting)
        assert isinstance(given["w"], ProjectedGradient)
        updates, low = update(given, low, PARAMS)
        agree(updates, expected, atol=1e-4)


@pytest.mark.standard_promotion
def test_adafactor_takes_every_kind_of_axes():
    tree = {"m": {"heads": gj.MatrixAxes(0, (1, 2)), "w": None}}
    params = {"m": {"heads": jnp.zeros((6, 2, 4)), "w": jnp.zeros((10, 6))}}
    for axes in (tree, lambda params: tree):
        gj.galore_adafactor(1e-2, 2, axes=axes).init(params)
