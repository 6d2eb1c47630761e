"""`align`: of all bases of the new subspace, the one closest to the old basis."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import numpy_galore as twin

import galore_jax as gj
from galore_jax import projectors

SHAPES = [(12, 4), (9, 1), (8, 7), (64, 16)]  # projected, rank


def orthonormal(rows, columns, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


def turn(new, old):
    dtype = jnp.float32
    return np.asarray(gj.transport.align().turn(jnp.asarray(new, dtype), jnp.asarray(old, dtype)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_procrustes_optimum(shape):
    new, old = orthonormal(*shape, 0), orthonormal(*shape, 1)
    turned = turn(new, old)
    np.testing.assert_allclose(turned, twin.aligned(new, old), atol=2e-5)
    # Optimal by definition, too: no other rotation of the new basis comes closer.
    distance = np.linalg.norm(turned - old)
    for seed in range(50):
        other = new @ orthonormal(shape[1], shape[1], seed + 2)
        assert distance <= np.linalg.norm(other - old) + 1e-5
    # And none nearby.
    rng = np.random.default_rng(0)
    for _ in range(20):
        skew = rng.normal(size=(shape[1], shape[1])) * 0.05
        nearby = turned @ np.linalg.qr(np.eye(shape[1]) + skew - skew.T)[0]
        nearby *= np.sign(np.sum(nearby * turned, axis=0))
        assert distance <= np.linalg.norm(nearby - old) + 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keeps_the_span_and_the_orthonormality(shape):
    new, old = orthonormal(*shape, 0), orthonormal(*shape, 1)
    turned = turn(new, old)
    np.testing.assert_allclose(turned @ turned.T, new @ new.T, atol=1e-5)
    np.testing.assert_allclose(turned.T @ turned, np.eye(shape[1]), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_undoes_a_rotation_within_the_same_subspace(shape):
    old = orthonormal(*shape, 0)
    rotated = old @ orthonormal(shape[1], shape[1], 1)
    np.testing.assert_allclose(turn(rotated, old), old, atol=1e-5)
    np.testing.assert_allclose(turn(old[:, ::-1] * -1, old), old, atol=1e-5)


def test_subspaces_without_overlap():
    both = orthonormal(12, 8, 0)
    turned = turn(both[:, :4], both[:, 4:])
    np.testing.assert_allclose(turned.T @ turned, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(turned @ turned.T, both[:, :4] @ both[:, :4].T, atol=1e-5)


def drifting(shape, steps, seed=0):
    rng = np.random.default_rng(seed)
    base, noise = rng.normal(size=shape), rng.normal(size=(steps, *shape))
    return (base + 0.5 * noise).astype(np.float32)


@pytest.mark.parametrize(
    "inner",
    [
        optax.scale_by_adam(eps=1e-3),
        optax.scale_by_lion(),
        gj.scale_by_factored_rms(),
        optax.chain(optax.clip(1.0), optax.trace(0.9)),
        optax.flatten(optax.scale_by_adam()),
    ],
    ids=["adam", "lion", "factored", "chain", "flatten"],
)
def test_serves_any_inner_and_leaves_its_state_alone(relaxed, inner):
    """In the lens, with a moving basis: the inner sees G·P and nothing else happens to it."""
    gradients, inner = drifting((10, 6), 5), relaxed(inner)
    tx = gj.low_rank_projection(inner, 2, refresh=2, projector=projectors.svd())
    state, update = tx.init({"w": jnp.zeros((10, 6))}), jax.jit(tx.update)
    alone, inner_update = state.inner_state, jax.jit(inner.update)
    old = np.eye(6, 2)
    for step, gradient in enumerate(gradients):
        updates, state = update({"w": gradient}, state)
        basis = np.asarray(state.projectors["w"])
        if step % 2 == 0:
            expected = twin.aligned(twin.singular_vectors(gradient, 2, 1), old)
            np.testing.assert_allclose(basis, expected, atol=2e-4)
        low, alone = inner_update({"w": jnp.asarray(gradient @ basis)}, alone)
        np.testing.assert_allclose(updates["w"], low["w"] @ basis.T, atol=2e-4)
        old = basis
    for ours, theirs in zip(
        jax.tree.leaves(state.inner_state), jax.tree.leaves(alone), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_projector_may_choose_any_basis_of_the_subspace(relaxed):
    """Signs and order of the projector's columns do not reach the trajectory."""
    gradients = drifting((10, 6), 7)
    runs = []
    for projector in (projectors.svd(), projectors.svd(signs="positive"), projectors.gram_eigh()):
        tx = gj.low_rank_projection(
            relaxed(optax.scale_by_adam(eps=1e-3)), 2, refresh=3, projector=projector
        )
        state, update = tx.init({"w": jnp.zeros((10, 6))}), jax.jit(tx.update)
        for gradient in gradients:
            updates, state = update({"w": gradient}, state)
        runs.append(updates["w"])
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-3)
    np.testing.assert_allclose(runs[0], runs[2], atol=1e-3)
