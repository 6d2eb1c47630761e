"""How much of a gradient a basis keeps, compared with the best basis of that rank."""

import numpy as np
import pytest

from galore_jax import projectors

RANK = 16
SHAPES = [(96, 64), (64, 96)]  # kept, projected


def with_spectrum(kept, projected, values, seed=0):
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(kept, len(values))))
    right, _ = np.linalg.qr(rng.normal(size=(projected, len(values))))
    return ((left * values) @ right.T).astype(np.float32)


def decaying(kind, kept, projected):
    i = np.arange(1, min(kept, projected) + 1)
    values = 1 / i if kind == "power" else np.exp(-4 * i / RANK) + 1e-4
    return with_spectrum(kept, projected, values)


def captured(matrix, basis):
    """‖G·P‖² as a share of the best a basis of this rank can do."""
    matrix, basis = np.asarray(matrix, np.float64), np.asarray(basis, np.float64)
    best = np.sum(np.linalg.svd(matrix, compute_uv=False)[: basis.shape[1]] ** 2)
    return np.sum((matrix @ basis) ** 2) / best


def exact_basis(matrix, rank=RANK):
    return np.linalg.svd(np.asarray(matrix, np.float64))[2][:rank].T


def drifted(kept, projected, seed):
    """A flat Gaussian gradient, the best basis of its past, and its present."""
    rng = np.random.default_rng(seed)
    past = rng.normal(size=(kept, projected))
    present = 0.9 * past + 0.1 * rng.normal(size=(kept, projected))
    return exact_basis(past), present.astype(np.float32)


@pytest.mark.parametrize("kind", ["power", "exp"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_cold_sketch_of_a_decaying_spectrum(find_basis, shape, kind):
    matrix = decaying(kind, *shape)
    for seed in range(3):
        basis = find_basis(projectors.randomized_svd(), matrix, RANK, seed=seed)
        assert 0.99 <= captured(matrix, basis) <= 1 + 1e-5


@pytest.mark.parametrize(
    "warm",
    [
        projectors.randomized_svd(),
        projectors.randomized_svd(oversample=4),
        projectors.subspace_iteration(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_warm_start_on_drifting_noise(find_basis, shape, warm):
    for seed in range(3):
        previous, matrix = drifted(*shape, seed)
        basis = find_basis(warm, matrix, RANK, previous=previous, seed=seed)
        assert captured(matrix, basis) >= 0.99


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_warm_start_follows_what_a_cold_one_cannot_see(find_basis, shape):
    previous, matrix = drifted(*shape, seed=0)
    cold = find_basis(projectors.randomized_svd(), matrix, RANK)
    warm = find_basis(projectors.randomized_svd(), matrix, RANK, previous=previous)
    assert captured(matrix, cold) < 0.97 < captured(matrix, warm)
    not_warm = projectors.randomized_svd(warm_start=False)
    assert captured(matrix, find_basis(not_warm, matrix, RANK, previous=previous)) < 0.97


def test_a_warm_start_improves_on_the_basis_it_starts_from(find_basis):
    previous, matrix = drifted(96, 64, seed=3)
    for warm in (projectors.randomized_svd(), projectors.subspace_iteration()):
        basis = find_basis(warm, matrix, RANK, previous=previous)
        assert captured(matrix, basis) > captured(matrix, previous) + 1e-3


@pytest.mark.parametrize("exact", [projectors.svd(), projectors.gram_eigh()], ids=repr)
@pytest.mark.parametrize("kind", ["power", "exp", "flat"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_projectors_keep_all_there_is_to_keep(find_basis, shape, kind, exact):
    matrix = drifted(*shape, 0)[1] if kind == "flat" else decaying(kind, *shape)
    assert captured(matrix, find_basis(exact, matrix, RANK)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "less, more",
    [
        (
            projectors.randomized_svd(power_iters=0, warm_start=False),
            projectors.randomized_svd(power_iters=1, warm_start=False),
        ),
        (projectors.randomized_svd(), projectors.randomized_svd(power_iters=4)),
        (projectors.randomized_svd(), projectors.randomized_svd(oversample=16)),
        (projectors.subspace_iteration(), projectors.subspace_iteration(steps=4)),
    ],
    ids=["sketch or power", "power", "oversample", "steps"],
)
def test_more_work_keeps_more(find_basis, less, more):
    matrix = drifted(96, 64, seed=1)[1]
    energies = [
        np.mean([captured(matrix, find_basis(p, matrix, RANK, seed=s)) for s in range(3)])
        for p in (less, more)
    ]
    assert energies[1] > energies[0] + 0.02


def test_oversampling_beyond_the_matrix_is_exact(find_basis):
    matrix = drifted(48, 32, seed=1)[1]
    everything = projectors.randomized_svd(oversample=1000, power_iters=0, warm_start=False)
    assert captured(matrix, find_basis(everything, matrix, RANK)) == pytest.approx(1, abs=1e-5)
