"""Gradients that break naive factorizations: every projector answers an orthonormal basis."""

import jax.numpy as jnp
import numpy as np
import pytest

KEPT, PROJECTED, RANK = 96, 128, 64


def gaussian(*shape):
    return np.random.default_rng(0).normal(size=shape)


def zero():
    return np.zeros((KEPT, PROJECTED))


def rank_deficient():
    return gaussian(KEPT, 20) @ gaussian(20, PROJECTED)


def rank_one():
    return np.outer(gaussian(KEPT), gaussian(PROJECTED))


def tiny():
    return 1e-25 * gaussian(KEPT, PROJECTED)


def huge():
    return 1e15 * gaussian(KEPT, PROJECTED)


def largest():
    return np.clip(1e38 * gaussian(KEPT, PROJECTED), -3e38, 3e38)


def one_huge_row():
    matrix = gaussian(KEPT, PROJECTED)
    matrix[5] *= 1e8
    return matrix


def one_huge_column():
    return one_huge_row().reshape(PROJECTED, KEPT).T.copy()


def duplicated_columns():
    return np.tile(gaussian(KEPT, PROJECTED // 8), (1, 8))


def duplicated_rows():
    return np.tile(gaussian(KEPT // 12, PROJECTED), (12, 1))


def single_entry():
    matrix = np.zeros((KEPT, PROJECTED))
    matrix[7, 100] = -3e-4
    return matrix


def single_column():
    matrix = np.zeros((KEPT, PROJECTED))
    matrix[:, 3] = 1
    return matrix


def constant():
    return np.full((KEPT, PROJECTED), 1e-3)


CASES = [
    zero,
    rank_deficient,
    rank_one,
    tiny,
    huge,
    largest,
    one_huge_row,
    one_huge_column,
    duplicated_columns,
    duplicated_rows,
    single_entry,
    single_column,
    constant,
]


@pytest.fixture(params=CASES, ids=lambda case: case.__name__)
def matrix(request):
    return request.param().astype(np.float32)


def check(basis):
    basis = np.asarray(basis, np.float64)
    assert np.all(np.isfinite(basis))
    assert np.max(np.abs(basis.T @ basis - np.eye(RANK))) <= 1e-5


def test_cold_and_warm_from_its_own_answer(find_basis, projector, matrix):
    """The same gradient again and again, as in a converged run."""
    basis = None
    for seed in range(2):
        basis = find_basis(projector, matrix, RANK, previous=basis, seed=seed)
        check(basis)


def test_previous_orthogonal_to_the_gradient(find_basis, projector):
    """A parameter whose gradient moved to rows that the old basis does not see at all."""
    matrix = np.zeros((KEPT, PROJECTED), np.float32)
    matrix[:, RANK:] = gaussian(KEPT, PROJECTED - RANK)
    check(find_basis(projector, matrix, RANK, previous=np.eye(PROJECTED, RANK)))


def test_warm_from_a_basis_rounded_to_bf16(find_basis, projector):
    rounded = jnp.asarray(np.linalg.qr(gaussian(PROJECTED, RANK))[0]).astype(jnp.bfloat16)
    for case in (zero, rank_deficient, single_entry):
        check(find_basis(projector, case().astype(np.float32), RANK, previous=rounded))


@pytest.mark.parametrize("case", [rank_deficient, rank_one, single_entry, single_column])
def test_a_low_rank_gradient_is_kept_whole(find_basis, projector, case):
    if type(projector).__name__ == "random_orthonormal":
        pytest.skip("does not look at the gradient")
    matrix = case().astype(np.float32)
    basis = np.asarray(find_basis(projector, matrix, RANK), np.float64)
    lost = matrix - matrix @ basis @ basis.T
    assert np.linalg.norm(lost) <= 1e-3 * np.linalg.norm(matrix)
