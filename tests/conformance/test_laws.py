"""Laws that every combination satisfies, over the table of `conformance_cases`."""

from __future__ import annotations

import conformance_cases as cc
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj

ADAM = cc.relaxed(optax.scale_by_adam())
every_case = pytest.mark.parametrize("case", cc.CASES, ids=str)


def assert_trees_close(one, other, atol):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), atol=atol, err_msg=str(path)
        )


def assert_trees_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=str(path))


# The table itself


@every_case
@pytest.mark.sampled(4)
def test_case_projects_matrices_below_full_rank(case):
    found = cc.bases(cc.run(case).states[0])
    assert len(found) >= 4
    for path, basis in found.items():
        _, projected = cc.projected_side(path, case.side)
        size = int(np.prod([cc.MATRICES[path][0][axis] for axis in projected]))
        assert basis.shape[1] == size
        assert 0 < basis.shape[2] < size


@every_case
def test_everything_else_stays_at_full_size(case):
    found = cc.bases(cc.run(case).states[0])
    skipped = {"dense/square"} if case.name == "rank-callable" else set()
    assert set(found) == set(cc.MATRICES) - skipped


def test_table_covers_every_choice():
    configs = [cc.projecting_lens(cc.run(case).states[0]).config for case in cc.CASES]

    def seen(seam):
        return {type(getattr(config, seam)) for config in configs}

    def offered(package, base):
        kinds = (getattr(package, name) for name in package.__all__)
        return {k for k in kinds if isinstance(k, type) and issubclass(k, base) and k is not base}

    assert seen("projector") == offered(gj.projectors, gj.projectors.Projector)
    assert seen("refresh") == offered(gj.refresh, gj.refresh.RefreshPolicy)
    assert seen("transport") == offered(gj.transport, gj.transport.Transport)
    assert {config.side for config in configs} == {"short", "long", "input", "output"}
    names = {case.name.split("-")[0] for case in cc.CASES}
    assert {name for name in gj.__all__ if name.startswith("galore")} <= names


# Law 5: fixed points


@every_case
def test_state_is_a_fixed_point_of_update(case):
    run = cc.run(case)
    for state in run.states[1:]:
        assert cc.signature(state) == cc.signature(run.states[0])
    for update in run.updates:
        assert cc.signature(update) == cc.signature(run.params)


@every_case
def test_second_step_does_not_retrace(case):
    assert cc.run(case).traces == 1


@every_case
def test_everything_is_finite_and_every_update_moves(case):
    run = cc.run(case)
    for update in run.updates:
        for path, leaf in cc.by_path(update).items():
            assert np.all(np.isfinite(leaf)), path
            assert path == cc.INTEGER or np.any(leaf != 0), path
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(run.states[-1]))


@pytest.mark.parametrize("case", [case for case in cc.CASES if case.integers], ids=str)
def test_integer_leaves_pass_through(case):
    for grads, update in zip(cc.gradients(), cc.run(case).updates, strict=True):
        before, after = (cc.by_path(t)[cc.INTEGER] for t in (grads, update))
        assert after.dtype == before.dtype
        assert int(after) == int(before)


@pytest.mark.xfail(strict=True, reason="optax.scale_by_learning_rate multiplies integer leaves")
def test_integer_leaves_pass_through_an_alias():
    tx, params = gj.galore_adamw(0.1, 3), {"w": jnp.ones((6, 9)), "n": jnp.asarray(3)}
    update, _ = tx.update(params, tx.init(params), params)
    assert update["n"].dtype == params["n"].dtype and int(update["n"]) == 3


@every_case
def test_no_array_of_the_state_is_empty(case):
    assert all(leaf.size > 0 for leaf in jax.tree.leaves(cc.run(case).states[-1]))


# Laws 1 and 2: the basis


@every_case
def test_bases_are_orthonormal_on_every_step(case):
    for state in cc.run(case).states:
        for path, basis in cc.bases(state).items():
            gram = np.einsum("bpr,bps->brs", basis, basis)
            error = np.max(np.abs(gram - np.eye(basis.shape[-1])))
            assert error <= case.basis_tolerance, path


@every_case
def test_updates_lie_in_the_span_of_the_basis_in_use(case):
    run = cc.run(case)
    for update, state in zip(run.updates, run.states[1:], strict=True):
        leaves = cc.by_path(update)
        for path, basis in cc.bases(state).items():
            matrices = cc.as_matrices(path, leaves[path], case.side)
            q, _ = np.linalg.qr(basis)
            outside = matrices - matrices @ q @ np.swapaxes(q, -2, -1)
            assert np.max(np.abs(outside)) <= 2e-6 * np.max(np.abs(matrices)), path
            assert np.linalg.matrix_rank(matrices, tol=1e-5).max() <= basis.shape[-1]


@every_case
def test_bases_move_when_they_are_due_and_only_then(case):
    run = cc.run(case)
    first = cc.projecting_lens(run.states[0])
    moves = {path: [] for path in cc.bases(run.states[0])}
    for before, after in zip(run.states[:-1], run.states[1:], strict=True):
        for path, basis in cc.bases(after).items():
            moves[path].append(np.any(basis != cc.bases(before)[path], axis=(1, 2)))
    counts = {path: np.sum(moved, axis=0) for path, moved in moves.items()}
    if isinstance(first.config.refresh, gj.refresh.every):
        expected = [step % cc.GAP == 0 for step in range(cc.STEPS)]
        for path, moved in moves.items():
            np.testing.assert_array_equal(np.all(moved, axis=1), expected, err_msg=path)
            np.testing.assert_array_equal(np.any(moved, axis=1), expected, err_msg=path)
    else:
        gap = first.config.refresh.gap
        assert all(np.all(moved[0]) for moved in moves.values())
        per_step = np.sum(np.concatenate([np.array(m[1:]) for m in moves.values()], axis=1), axis=1)
        total = sum(len(count) for count in counts.values())
        assert np.max(per_step) <= -(-total // gap)
        for start in range(1, cc.STEPS - gap):
            assert np.sum(per_step[start : start + gap]) == total
    last = cc.projecting_lens(run.states[-1])
    for path, refreshes in cc.by_path(last.refresh_state.refreshes).items():
        if path in counts:
            np.testing.assert_array_equal(np.ravel(refreshes), counts[path], err_msg=path)


@every_case
def test_a_basis_in_use_catches_the_gradient_it_was_made_from(case):
    """At least what a random subspace of its dimension is expected to catch, on most matrices."""
    lens = cc.projecting_lens(cc.run(case).states[1])
    better = []
    grads = cc.by_path(cc.gradients(case.integers)[0])
    for path, basis in cc.bases(cc.run(case).states[1]).items():
        matrices = cc.as_matrices(path, grads[path], case.side)
        q, _ = np.linalg.qr(basis)
        caught = np.sum((matrices @ q) ** 2, axis=(1, 2)) / np.sum(matrices**2, axis=(1, 2))
        better.extend(caught > basis.shape[2] / basis.shape[1])
    if not isinstance(lens.config.projector, gj.projectors.random_orthonormal):
        assert np.all(better)


def test_project_then_lift_with_a_square_basis_is_the_identity():
    rng = np.random.default_rng(0)
    for path in cc.MATRICES:
        leaf = jnp.asarray(rng.normal(size=cc.MATRICES[path][0]), jnp.float32)
        for side in ("short", "long", "input", "output"):
            (plan,) = gj.views.leaf_plan(
                gj.low_rank_projection(
                    optax.identity(), 1, side=side, axes=cc.AXES, targets=gj.all_matrices
                )
                .init({path: leaf})
                .config,
                {path: leaf},
            )
            view = plan.view
            *batch, size, _ = view.basis_shape(1)
            square = np.linalg.qr(rng.normal(size=(*batch, size, size)))[0]
            square = jnp.asarray(square, jnp.float32)
            low = view.project(leaf, square)
            by_hand = cc.as_matrices(path, leaf, side) @ np.reshape(
                np.asarray(square, np.float64), (-1, size, size)
            )
            np.testing.assert_allclose(np.reshape(low, by_hand.shape), by_hand, atol=1e-5)
            np.testing.assert_allclose(view.lift(low, square, leaf.dtype), leaf, atol=1e-5)


class Fixed(gj.projectors.Projector):
    """A basis given in advance."""

    canonical_columns = True

    def __init__(self, basis):
        self._basis = basis

    def basis(self, gradient, rank, *, previous, refreshes, key):
        del rank, previous, refreshes, key
        return jnp.asarray(self._basis, gradient.dtype)


def test_fixed_basis_means_adam_in_rotated_coordinates():
    """W = A·Pᵀ with square P: GaLore's rank-r part is Adam on the first r coordinates of W·P."""
    rng = np.random.default_rng(1)
    square = np.linalg.qr(rng.normal(size=(7, 7)))[0].astype(np.float32)
    for rank in (1, 6):
        tx = gj.low_rank_projection(
            ADAM, rank, refresh=2, side="output", axes=gj.MatrixAxes(),
            projector=Fixed(square[:, :rank]), transport=gj.transport.keep(),
        )  # fmt: skip
        adam = ADAM
        params = jnp.zeros((9, 7))
        state, rotated = tx.init(params), adam.init(params)
        step = cc.jit(tx.update)
        for _ in range(5):
            grads = jnp.asarray(rng.normal(size=(9, 7)), jnp.float32)
            update, state = step(grads, state)
            expected, rotated = adam.update(grads @ square, rotated)
            np.testing.assert_allclose(update @ square, expected.at[:, rank:].set(0), atol=3e-5)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)])
def test_rank_one_below_the_dimension_loses_one_direction_only(shape):
    tx = gj.low_rank_projection(optax.identity(), 5, projector=gj.projectors.svd())
    grads = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
    update, state = tx.update(grads, tx.init(grads))
    assert state.projectors.shape == (6, 5)
    values = np.linalg.svd(grads, compute_uv=False)
    np.testing.assert_allclose(
        np.linalg.svd(grads - update, compute_uv=False), [values[-1], 0, 0, 0, 0, 0], atol=1e-5
    )


@pytest.mark.parametrize("rank", [6, 7, 100, 1.0])
def test_full_rank_is_the_plain_inner_without_scale(rank):
    adam = ADAM
    tx = gj.low_rank_projection(adam, rank, scale=0.25)
    grads = jnp.asarray(np.random.default_rng(3).normal(size=(9, 6)), jnp.float32)
    state, expected_state = tx.init(grads), adam.init(grads)
    assert state.inner_state.mu.shape == (9, 6)
    for _ in range(3):
        update, state = tx.update(grads, state)
        expected, expected_state = adam.update(grads, expected_state)
        np.testing.assert_array_equal(update, expected)


# Law 3: layouts do not matter

LAYOUTS = [
    pytest.param(projector, transport, id=f"{type(projector).__name__}-{type(transport).__name__}")
    for projector, transport in (
        (gj.projectors.svd(), gj.transport.keep()),
        (gj.projectors.svd(), gj.transport.align()),
        (gj.projectors.gram_eigh(), gj.transport.rotate()),
        (gj.projectors.gram_eigh(), gj.transport.reset()),
    )
]


def follow(tx, grads):
    state = tx.init(grads[0])
    step = cc.jit(tx.update)
    updates = []
    for grad in grads:
        update, state = step(grad, state)
        updates.append(update)
    return updates, state


def noise(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("projector", "transport"), LAYOUTS)
def test_stack_is_its_slices(projector, transport):
    grads = noise(4, 5, 3, 6, 9)
    tx = gj.low_rank_projection(
        ADAM, 3, refresh=2, projector=projector, transport=transport,
        axes=gj.MatrixAxes(-2, -1),
    )  # fmt: skip
    stacked, state = follow(tx, [{"w": grad} for grad in grads])
    single, single_state = follow(tx, [dict(zip("abc", grad, strict=True)) for grad in grads])
    for layer, name in enumerate("abc"):
        for one, other in zip(stacked, single, strict=True):
            np.testing.assert_allclose(one["w"][layer], other[name], atol=2e-5)
        np.testing.assert_allclose(
            state.projectors["w"][layer], single_state.projectors[name], atol=2e-5
        )


def test_first_matrix_of_a_stack_draws_the_keys_of_a_single_one():
    """With keys: the same path and matrix number draw the same bits, in or out of a stack."""
    grads = noise(5, 4, 3, 6, 9)
    tx = gj.low_rank_projection(
        ADAM, 3, refresh=2, projector=gj.projectors.random_orthonormal(),
        axes=gj.MatrixAxes(-2, -1),
    )  # fmt: skip
    stacked, _ = follow(tx, [{"w": grad} for grad in grads])
    single, _ = follow(tx, [{"w": grad[0]} for grad in grads])
    other, _ = follow(tx, [{"v": grad[0]} for grad in grads])
    for one, two, three in zip(stacked, single, other, strict=True):
        np.testing.assert_allclose(one["w"][0], two["w"], atol=2e-5)
        assert np.max(np.abs(two["w"] - three["v"])) > 1e-3  # another path, other keys


def test_equal_matrices_of_a_stack_draw_different_keys():
    grads = [{"w": jnp.broadcast_to(grad, (3, 6, 9))} for grad in noise(6, 2, 6, 9)]
    tx = gj.low_rank_projection(
        ADAM, 3, projector=gj.projectors.random_orthonormal(),
        axes=gj.MatrixAxes(-2, -1),
    )  # fmt: skip
    _, state = follow(tx, grads)
    one, two, three = np.asarray(state.projectors["w"])
    assert np.max(np.abs(one - two)) > 1e-2 and np.max(np.abs(two - three)) > 1e-2


@pytest.mark.parametrize("warm_start", [True, False])
def test_slices_of_a_stack_agree_up_to_keys_where_the_subspace_is_exact(warm_start):
    """A gradient of rank 3 has one dominant subspace of rank 3, whatever sketch finds it."""
    left, right = noise(7, 4, 3, 6, 3), noise(8, 4, 3, 3, 9)
    grads = left @ right
    tx = gj.low_rank_projection(
        ADAM, 3, refresh=2, axes=gj.MatrixAxes(-2, -1),
        projector=gj.projectors.randomized_svd(warm_start=warm_start, power_iters=2),
    )  # fmt: skip
    stacked, _ = follow(tx, [{"w": grad} for grad in grads])
    single, _ = follow(tx, [dict(zip("abc", grad, strict=True)) for grad in grads])
    for one, other in zip(stacked, single, strict=True):
        for layer, name in enumerate("abc"):
            np.testing.assert_allclose(one["w"][layer], other[name], atol=5e-3)


PERMUTED = {
    "transposed": (noise(9, 4, 6, 9), (1, 0), gj.MatrixAxes(0, 1), gj.MatrixAxes(1, 0)),
    "stack last": (
        noise(10, 4, 2, 6, 9), (1, 2, 0), gj.MatrixAxes(1, 2), gj.MatrixAxes(0, 1),
    ),
    "heads first": (
        noise(11, 4, 10, 2, 4), (1, 2, 0), gj.MatrixAxes(0, (1, 2)), gj.MatrixAxes(2, (0, 1)),
    ),
    "heads apart": (
        noise(12, 4, 10, 2, 4), (1, 0, 2), gj.MatrixAxes(0, (1, 2)), gj.MatrixAxes(1, (0, 2)),
    ),
    "batch in the middle": (
        noise(13, 4, 3, 6, 8), (1, 0, 2), gj.MatrixAxes(-2, -1), gj.MatrixAxes(0, 2),
    ),
    "two batch axes apart": (
        noise(14, 4, 2, 3, 6, 8), (0, 2, 1, 3), gj.MatrixAxes(-2, -1), gj.MatrixAxes(1, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PERMUTED)
@pytest.mark.parametrize("projector", [gj.projectors.svd(), gj.projectors.randomized_svd()])
@pytest.mark.sampled(3)
def test_permuted_axes_with_matching_matrix_axes_change_nothing(name, projector):
    """Keys included: path and matrix number are the same on both sides."""
    grads, order, axes, permuted_axes = PERMUTED[name]

    def lens(axes):
        return gj.low_rank_projection(ADAM, 3, refresh=2, projector=projector, axes=axes)

    plain, state = follow(lens(axes), [{"w": grad} for grad in grads])
    permuted, permuted_state = follow(
        lens(permuted_axes), [{"w": jnp.transpose(grad, order)} for grad in grads]
    )
    for one, other in zip(plain, permuted, strict=True):
        np.testing.assert_allclose(jnp.transpose(one["w"], order), other["w"], atol=5e-5)
    assert_trees_close(state.inner_state.mu, permuted_state.inner_state.mu, 5e-5)


def test_path_and_seed_choose_the_random_bits():
    grads = [{"w": grad} for grad in noise(15, 2, 6, 9)]

    def bases(seed):
        tx = gj.low_rank_projection(
            optax.identity(), 3, projector=gj.projectors.random_orthonormal(), seed=seed
        )
        return follow(tx, grads)[1].projectors["w"]

    np.testing.assert_array_equal(bases(1), bases(1))
    assert np.max(np.abs(bases(1) - bases(2))) > 1e-2


# Law 7: abstract parameters


@every_case
def test_abstract_init_has_the_structure_of_the_concrete_one(case):
    tx, state = case.make(), cc.run(case).states[0]
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cc.tree(integers=case.integers)
    )
    assert jax.tree.structure(jax.eval_shape(tx.init, shapes)) == jax.tree.structure(state)
    if case.name != "galore_adafactor":  # optax.scale_by_factored_rms itself needs arrays
        initial = tx.init(shapes)
        assert jax.tree.structure(initial) == jax.tree.structure(state)
        assert_trees_equal(initial, state)


def test_trees_of_the_state_have_an_array_at_every_leaf_of_the_parameters():
    for case in cc.CASES:
        if case.name == "galore_adafactor":  # optax.partition puts MaskedNode there
            continue
        lens = cc.projecting_lens(cc.run(case).states[0])
        expected = jax.tree.structure(cc.tree(integers=case.integers))
        assert jax.tree.structure(lens.projectors) == expected
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(lens))


# Corners


@pytest.mark.parametrize(
    "shape",
    [
        (5, 0),
        (5, 7, 0),
        (0, 6, 9),
    ],
)
def test_empty_leaves_pass_through(shape):
    params = {"empty": jnp.zeros(shape), "w": jnp.ones((6, 9))}
    tx = gj.low_rank_projection(ADAM, 3, side="input", axes=gj.MatrixAxes(-2, -1))
    if shape == (5, 0):
        tx = gj.low_rank_projection(ADAM, 3, axes=gj.MatrixAxes(-2, -1))
    state = tx.init(params)
    update, after = tx.update(params, state)
    assert update["empty"].shape == shape and np.any(update["w"])
    assert cc.signature(after) == cc.signature(state)


def test_gradients_of_integer_leaves_as_jax_gives_them():
    params = {"n": jnp.asarray(3), "w": jnp.ones((6, 9))}
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    tx = gj.low_rank_projection(ADAM, 3)
    update, _ = tx.update(grads, tx.init(params))
    assert update["n"].dtype == grads["n"].dtype == jax.dtypes.float0


@pytest.mark.parametrize(
    ("params", "grads"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")]
)
def test_gradients_of_another_dtype_than_the_parameters(params, grads):
    tx = gj.low_rank_projection(ADAM, 3)
    state = tx.init({"w": noise(16, 6, 9).astype(params)})
    update, after = tx.update({"w": noise(17, 6, 9).astype(grads)}, state)
    assert update["w"].dtype == jnp.dtype(grads)
    assert cc.signature(after) == cc.signature(state)


# Bad gradients


@pytest.mark.parametrize("bad", [np.nan, -np.inf, 0.0])
@every_case
def test_useless_gradient_never_becomes_a_basis_and_is_retried(case, bad):
    run = cc.run(case)

    def spoil(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.zeros_like(leaf) if bad == 0 else leaf.at[(0,) * leaf.ndim].set(bad)

    grads = cc.gradients(case.integers)
    state = run.states[cc.GAP]  # a refresh is due now (`every`), or for some matrices
    with case.promotion:
        _, after = run.step(jax.tree.map(spoil, grads[cc.GAP]), state, run.params)
    for path, basis in cc.bases(after).items():
        before = cc.bases(state)[path]
        np.testing.assert_array_equal(basis[0], before[0], err_msg=path)
        assert np.all(np.isfinite(basis))
    lens = cc.projecting_lens(after)
    previous = cc.projecting_lens(state)
    retry = cc.by_path(lens.refresh_state.due)
    for path, due in cc.by_path(previous.refresh_state.due).items():
        if path in cc.bases(state):
            assert np.ravel(retry[path])[0] >= np.ravel(due)[0], path
