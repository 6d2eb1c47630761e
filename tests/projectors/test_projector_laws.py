"""What holds for every projector: orthonormal, blind to scale, deterministic, dominant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax import projectors

# kept, projected, rank
SHAPES = {
    "tall": (24, 12, 4),
    "rank one": (20, 10, 1),
    "one short of square": (8, 8, 7),
    "wide, rank is kept": (6, 24, 6),
}
EXACT = [projectors.svd(), projectors.svd(signs="positive"), projectors.gram_eigh()]
POWERED = [
    projectors.randomized_svd(power_iters=3),
    projectors.randomized_svd(oversample=2, power_iters=2, warm_start=False),
    projectors.subspace_iteration(steps=4),
]


def gaussian(kept, projected, seed=0):
    return np.random.default_rng(seed).normal(size=(kept, projected)).astype(np.float32)


def with_spectrum(kept, projected, values, seed=0):
    """A matrix with these singular values, the rest zero."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(kept, len(values))))
    right, _ = np.linalg.qr(rng.normal(size=(projected, len(values))))
    return ((left * values) @ right.T).astype(np.float32)


def gapped(kept, projected, rank):
    """Singular values 2 … 1, then a drop to 0.02."""
    values = np.full(min(kept, projected), 0.02)
    values[:rank] = np.linspace(2, 1, rank)
    return with_spectrum(kept, projected, values)


def dominant(matrix, rank):
    """P·Pᵀ of the leading right singular vectors, in float64."""
    basis = np.linalg.svd(np.asarray(matrix, np.float64))[2][:rank].T
    return basis @ basis.T


def subspace(basis):
    basis = np.asarray(basis, np.float64)
    return basis @ basis.T


def orthonormality(basis):
    basis = np.asarray(basis, np.float64)
    return np.max(np.abs(basis.T @ basis - np.eye(basis.shape[1])))


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request):
    return request.param


@pytest.mark.sampled(4)
def test_columns_are_orthonormal_cold_and_warm(find_basis, projector, shape):
    kept, projected, rank = shape
    first = find_basis(projector, gaussian(kept, projected), rank)
    assert first.shape == (projected, rank) and first.dtype == jnp.float32
    assert orthonormality(first) <= 1e-5
    second = find_basis(projector, gaussian(kept, projected, seed=1), rank, previous=first)
    assert orthonormality(second) <= 1e-5


@pytest.mark.parametrize("size, rank", [(4, 3), (8, 7), (8, 3)], ids=str)
def test_small_squares_whatever_the_key(find_basis, projector, size, rank):
    """A draw must not be able to repeat a column."""
    matrix = gaussian(size, size)
    worst = [orthonormality(find_basis(projector, matrix, rank, seed=s)) for s in range(40)]
    assert np.max(worst) <= 1e-5  # NaN compares false


@pytest.mark.parametrize("factor", [2.0**40, 3.7e-9])
def test_positive_scaling_does_not_change_the_subspace(find_basis, projector, shape, factor):
    kept, projected, rank = shape
    matrix = gapped(kept, projected, rank)
    for previous in (None, find_basis(projector, gaussian(kept, projected, seed=1), rank)):
        one = find_basis(projector, matrix, rank, previous=previous)
        other = find_basis(projector, matrix * np.float32(factor), rank, previous=previous)
        np.testing.assert_allclose(subspace(one), subspace(other), atol=2e-4)


def test_same_matrix_and_key_same_bits(find_basis, projector):
    def run(seed):
        return np.asarray(find_basis(projector, gaussian(24, 12), 4, seed=seed))

    np.testing.assert_array_equal(run(0), run(0))
    draws = not isinstance(projector, projectors.svd | projectors.gram_eigh)
    assert np.array_equal(run(0), run(1)) != draws


@pytest.mark.parametrize("projects_input", [True, False])
@pytest.mark.parametrize("exact", EXACT, ids=repr)
def test_exact_projectors_find_the_dominant_subspace(find_basis, exact, shape, projects_input):
    kept, projected, rank = shape
    matrix = gapped(kept, projected, rank)
    basis = find_basis(exact, matrix, rank, projects_input=projects_input)
    # gram_eigh mixes 1e-4 of the previous basis in when it lifts from the kept side.
    lifted = isinstance(exact, projectors.gram_eigh) and projected > kept
    np.testing.assert_allclose(
        subspace(basis), dominant(matrix, rank), atol=2e-4 if lifted else 1e-5
    )


@pytest.mark.parametrize("powered", POWERED, ids=repr)
def test_power_iterations_find_the_dominant_subspace(find_basis, powered, shape):
    kept, projected, rank = shape
    matrix = gapped(kept, projected, rank)
    cold = find_basis(powered, matrix, rank)
    np.testing.assert_allclose(subspace(cold), dominant(matrix, rank), atol=5e-4)
    other = find_basis(powered, gaussian(kept, projected, seed=2), rank)
    warm = find_basis(powered, matrix, rank, previous=other)
    np.testing.assert_allclose(subspace(warm), dominant(matrix, rank), atol=5e-4)


@pytest.mark.parametrize("exact", EXACT, ids=repr)
def test_canonical_columns_are_singular_vectors_in_order(find_basis, exact, shape):
    kept, projected, rank = shape
    matrix = gapped(kept, projected, rank)
    expected = np.linalg.svd(matrix.astype(np.float64))[2][:rank].T
    cosines = np.sum(np.asarray(find_basis(exact, matrix, rank)) * expected, axis=0)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-4)


@pytest.mark.parametrize("exact", EXACT[1:], ids=repr)
def test_positive_signs(find_basis, exact):
    matrix = gapped(24, 12, 4)
    basis = np.asarray(find_basis(exact, matrix, 4))
    assert np.all(basis[np.argmax(np.abs(basis), axis=0), np.arange(4)] > 0)
    np.testing.assert_allclose(find_basis(exact, -matrix, 4), basis, atol=1e-5)


@pytest.mark.parametrize("kept, projected", [(24, 12), (12, 24)])
@pytest.mark.parametrize("projects_input", [True, False])
def test_svd_keeps_the_signs_of_the_gradient_in_its_own_orientation(
    find_basis, kept, projected, projects_input
):
    matrix = gapped(kept, projected, 4)  # [kept, projected]
    gradient = matrix.T if projects_input else matrix  # [reduction, output]
    left, _, right = jax.jit(lambda g: jnp.linalg.svd(g, full_matrices=False))(gradient)
    expected = left[:, :4] if projects_input else right[:4].T
    basis = find_basis(projectors.svd(), matrix, 4, projects_input=projects_input)
    np.testing.assert_allclose(basis, expected, atol=1e-5)


def test_random_orthonormal_does_not_look_at_the_gradient(find_basis):
    bases = [find_basis(projectors.random_orthonormal(), gaussian(9, 12, s), 4) for s in (0, 1)]
    np.testing.assert_array_equal(*bases)


def test_random_orthonormal_prefers_no_direction(find_basis):
    total = sum(
        subspace(find_basis(projectors.random_orthonormal(), gaussian(3, 8), 2, seed=seed))
        for seed in range(200)
    )
    np.testing.assert_allclose(total / 200, np.eye(8) * 2 / 8, atol=0.08)


def test_a_cold_start_forgets_the_previous_basis(find_basis, projector):
    """And a start that is not warm does so always."""
    if getattr(projector, "warm_start", True) and not isinstance(
        projector, projectors.svd | projectors.random_orthonormal
    ):
        pytest.skip("warm starts are looked at in test_energy")
    matrix = gaussian(24, 12)
    other = find_basis(projectors.random_orthonormal(), matrix, 4, seed=5)
    np.testing.assert_allclose(
        subspace(find_basis(projector, matrix, 4)),
        subspace(find_basis(projector, matrix, 4, previous=other)),
        atol=1e-3,
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16])
def test_low_precision_gradients_work_in_fp32(find_basis, projector, dtype):
    matrix = jnp.asarray(gapped(24, 12, 4)).astype(dtype)
    basis = find_basis(projector, matrix, 4)
    assert basis.dtype == jnp.float32
    assert orthonormality(basis) <= 1e-5
    same = find_basis(projector, matrix.astype(jnp.float32), 4)
    np.testing.assert_array_equal(basis, same)


def test_double_precision_stays_double(find_basis, projector):
    with jax.enable_x64(True):
        matrix = jnp.asarray(gapped(24, 12, 4).astype(np.float64))
        basis = find_basis(projector, matrix, 4)
        assert basis.dtype == jnp.float64
        assert orthonormality(basis) <= 1e-12


def test_projectors_are_values(projector):
    fields = {name: getattr(projector, name) for name in projector.__dataclass_fields__}
    twin = type(projector)(**fields)
    assert twin == projector and hash(twin) == hash(projector)
    assert not callable(projector)
    with pytest.raises(AttributeError):
        projector.steps = 3
