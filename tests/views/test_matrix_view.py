"""The two products with a basis, against NumPy on explicitly moved axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_jax as gj
from galore_jax.views.matrix_view import matrix_view

SIDES = ["short", "long", "input", "output"]
# shape, reduction axes, output axes
CASES = {
    "matrix": ((6, 4), -2, -1),
    "wide": ((4, 6), -2, -1),
    "transposed": ((6, 4), 1, 0),
    "square": ((5, 5), 0, 1),
    "stack": ((3, 6, 4), -2, -1),
    "stack last": ((6, 4, 3), 0, 1),
    "stack between": ((6, 3, 4), 2, 0),
    "two batch axes": ((2, 6, 3, 4), 1, 3),
    "batch axes out of order": ((2, 6, 3, 4, 2), 3, 1),
    "attention in": ((6, 2, 3), 0, (1, 2)),
    "attention out": ((2, 3, 5), (0, 1), 2),
    "grouped backwards": ((2, 3, 5), (1, 0), 2),
    "grouped around": ((2, 5, 3), (2, 0), 1),
    "groups interleaved": ((2, 3, 4, 2), (3, 1), (2, 0)),
    "stack between, grouped": ((6, 2, 4, 5), 0, (2, 3)),
    "grouped in no order": ((6, 2, 4, 3), (0, 3, 1), 2),
    "everything": ((2, 3, 2, 4, 2), (3, 1), (4, 0)),
    "size one": ((1, 6, 4), 1, (0, 2)),
}


def tuples(axes, ndim):
    return tuple(a % ndim for a in (axes if isinstance(axes, tuple) else (axes,)))


def matrices(array, reduction, output, projects_input):
    """`[*batch, kept, projected]`, by moving axes."""
    reduction, output = tuples(reduction, array.ndim), tuples(output, array.ndim)
    batch = tuple(a for a in range(array.ndim) if a not in reduction + output)
    kept, projected = (output, reduction) if projects_input else (reduction, output)
    moved = np.transpose(array, batch + kept + projected)
    shape = moved.shape
    inner = [int(np.prod([array.shape[a] for a in axes])) for axes in (kept, projected)]
    return moved.reshape(*shape[: len(batch)], *inner)


def expected_input(shape, reduction, output, side):
    rows, columns = (
        int(np.prod([shape[a] for a in tuples(axes, len(shape))])) for axes in (reduction, output)
    )
    return {"short": rows <= columns, "long": rows >= columns, "input": True, "output": False}[side]


def gaussian(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


@pytest.fixture(params=SIDES)
def side(request):
    return request.param


def test_sizes(case, side):
    shape, *axes = case
    view = matrix_view(shape, gj.MatrixAxes(*axes), side)
    assert view.projects_input == expected_input(shape, *axes, side)
    expected = matrices(np.zeros(shape), *axes, view.projects_input).shape
    assert (*view.batch_shape, view.kept_size, view.projected_size) == expected
    assert view.num_matrices == int(np.prod(expected[:-2]))
    assert view.basis_shape(2) == (*expected[:-2], expected[-1], 2)
    assert view.low_rank_shape(2) == (*expected[:-1], 2)
    assert set(view.batch + view.kept + view.projected) == set(range(len(shape)))


def test_project_and_lift(case, side):
    shape, *axes = case
    view = matrix_view(shape, gj.MatrixAxes(*axes), side)
    leaf, basis = gaussian(shape), gaussian(view.basis_shape(2), seed=1)
    expected = matrices(leaf, *axes, view.projects_input) @ basis
    low_rank = view.project(jnp.asarray(leaf), jnp.asarray(basis))
    assert low_rank.shape == view.low_rank_shape(2)
    np.testing.assert_allclose(low_rank, expected, atol=1e-5)
    lifted = view.lift(low_rank, jnp.asarray(basis), jnp.float32)
    assert lifted.shape == shape
    product = expected @ np.swapaxes(basis, -2, -1)
    np.testing.assert_allclose(
        matrices(np.asarray(lifted), *axes, view.projects_input), product, atol=1e-4
    )


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits(case, side, dtype):
    """The CPU backend compiles products that it then cannot run."""
    shape, *axes = case
    view = matrix_view(shape, gj.MatrixAxes(*axes), side)
    leaf = jnp.asarray(gaussian(shape), dtype)
    basis = jnp.asarray(gaussian(view.basis_shape(2), seed=1), dtype).astype(jnp.float32)
    low_rank = jax.jit(view.project)(leaf, basis)
    assert low_rank.dtype == jnp.float32
    wide = np.asarray(leaf, np.float32)
    expected = matrices(wide, *axes, view.projects_input) @ np.asarray(basis)
    np.testing.assert_allclose(low_rank, expected, atol=1e-5)
    lifted = jax.jit(lambda *args: view.lift(*args, leaf.dtype))(low_rank, basis)
    assert lifted.dtype == leaf.dtype
    lifted = matrices(np.asarray(lifted, np.float32), *axes, view.projects_input)
    product = expected @ np.swapaxes(np.asarray(basis), -2, -1)
    np.testing.assert_allclose(lifted, product, atol=0.05 * np.max(np.abs(product)))


def test_a_square_orthonormal_basis_changes_nothing(case, side):
    shape, *axes = case
    view = matrix_view(shape, gj.MatrixAxes(*axes), side)
    basis = np.linalg.qr(gaussian(view.basis_shape(view.projected_size)))[0]
    leaf, basis = jnp.asarray(gaussian(shape)), jnp.asarray(basis)
    same = view.lift(view.project(leaf, basis), basis, jnp.float32)
    np.testing.assert_allclose(same, leaf, atol=1e-5)


def test_one_matrix_at_a_time(case, side):
    shape, *axes = case
    view = matrix_view(shape, gj.MatrixAxes(*axes), side)
    leaf = gaussian(shape)
    stack = matrices(leaf, *axes, view.projects_input)
    stack = stack.reshape(-1, *stack.shape[-2:])
    alone = view.unbatched
    assert alone.batch == () and alone.projects_input == view.projects_input
    entry = jax.jit(view.entry)
    for index in range(view.num_matrices):
        one = entry(leaf, jnp.int32(index))
        assert one.shape == alone.shape
        np.testing.assert_array_equal(alone.to_matrices(one), stack[index])


def test_all_matrices_at_once_and_transposed(case, side):
    shape, *axes = case
    view = matrix_view(shape, gj.MatrixAxes(*axes), side)
    leaf = gaussian(shape)
    expected = matrices(leaf, *axes, view.projects_input)
    np.testing.assert_array_equal(view.to_matrices(jnp.asarray(leaf)), expected)
    np.testing.assert_array_equal(
        view.transposed.to_matrices(jnp.asarray(leaf)), np.swapaxes(expected, -2, -1)
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_leaves_accumulate_in_the_basis_dtype(dtype):
    view = matrix_view((2, 512), gj.MatrixAxes(), "output")
    leaf = jnp.asarray(1 + gaussian((2, 512)) / 8).astype(dtype)
    basis = jnp.ones((512, 1), jnp.float32)
    low_rank = view.project(leaf, basis)
    assert low_rank.dtype == jnp.float32
    exact = np.asarray(leaf, np.float64).sum(1, keepdims=True)
    np.testing.assert_allclose(low_rank, exact, rtol=1e-5)  # bf16 sums are off by 1e-3
    assert view.lift(low_rank, basis, dtype).dtype == dtype


@pytest.mark.parametrize("side", ["Short", "left", None, 0])
def test_unknown_side(side):
    with pytest.raises(ValueError, match="'short'") as error:
        gj.low_rank_projection(gj.scale_by_factored_rms(), 2, side=side)
    assert repr(side) in str(error.value)


def test_no_operation_needs_a_concrete_leaf():
    view = matrix_view((3, 6, 4), gj.MatrixAxes(), "short")
    leaf, basis = jax.ShapeDtypeStruct((3, 6, 4), jnp.float32), jnp.zeros(view.basis_shape(2))
    assert jax.eval_shape(view.project, leaf, basis).shape == (3, 6, 2)
