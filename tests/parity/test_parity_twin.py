"""Step by step the float64 NumPy twin, for everything that is plain GaLore with another transport.

The package runs with jax_enable_x64 and float64 leaves and state, so that 20 steps agree to 1e-9;
the signs of singular vectors are made positive on both sides.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj

# Tests compile far longer than they run.
FAST = {"xla_backend_optimization_level": 0}

_spec = importlib.util.spec_from_file_location(
    "_numpy_twin", Path(__file__).parents[1] / "reference" / "numpy_galore.py"
)
assert _spec is not None and _spec.loader is not None
twin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(twin)

STEPS, GAP, RANK = 20, 5, 3
INNERS = {
    "adam": (optax.scale_by_adam(0.9, 0.99, 1e-6), twin.adam(0.9, 0.99, 1e-6)),
    "sgd": (optax.identity(), twin.sgd()),
    "trace": (optax.trace(0.9), twin.trace(0.9)),
    "lion": (optax.scale_by_lion(0.9, 0.99), twin.lion(0.9, 0.99)),
}
TRANSPORTS = {
    "keep": gj.transport.keep(),
    "align": gj.transport.align(),
    "reset": gj.transport.reset(),
    "rotate": gj.transport.rotate(0.9, 0.99),
}
SHAPES = {"tall": (9, 6), "wide": (6, 9), "square": (7, 7)}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def positive(grad, rank, axis):
    basis = twin.singular_vectors(grad, rank, axis)
    largest = np.argmax(np.abs(basis), axis=0)
    return basis * np.sign(basis[largest, np.arange(rank)])


def gradients(shape, seed=0):
    """Singular values well apart, and a slowly turning subspace, as in training."""
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    base = u * (1.0 + np.arange(min(shape))[::-1]) @ vt
    return base + 0.2 * rng.normal(size=(STEPS, *shape)).cumsum(axis=0)


def ours(tx, weights, grads):
    """Runs all leaves at once: one compilation for many comparisons."""
    params = {name: jnp.asarray(w) for name, w in weights.items()}
    state, trajectory = tx.init(params), []
    step = jax.jit(tx.update, compiler_options=FAST)
    for i in range(STEPS):
        updates, state = step({name: jnp.asarray(g[i]) for name, g in grads.items()}, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return {name: np.stack([params[name] for params in trajectory]) for name in weights}, state


def compare(inner, transport, side, grads=None, **options):
    grads = grads or {name: gradients(shape) for name, shape in SHAPES.items()}
    weights = {name: np.ones(shape) for name, shape in SHAPES.items()}
    their_inner, twins = INNERS[inner]
    numbers = {"scale": 0.5, "weight_decay": 0.1} | options
    tx = gj.galore(
        0.05, RANK, GAP, base_optimizer=their_inner, side=side, state_dtype=jnp.float64,
        projector=gj.projectors.svd(signs="positive"), transport=TRANSPORTS[transport], **numbers,
    )  # fmt: skip
    found, state = ours(tx, weights, grads)
    assert state[0].inner_state is not None
    for name in SHAPES:
        expected, optimizer = twin.run(
            weights[name], grads[name], RANK, twins, gap=GAP, side=side, lr=0.05,
            transport=transport, basis_of=positive, **numbers,
        )  # fmt: skip
        basis = state[0].projectors[name]
        assert basis.dtype == jnp.float64
        np.testing.assert_allclose(basis, optimizer.basis, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(found[name], expected, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("side", ["short", "long", "input", "output"])
def test_plain_galore(inner, side):
    compare(inner, "keep", side)


@pytest.mark.parametrize("inner", ["adam", "trace", "lion"])
@pytest.mark.parametrize("transport", ["align", "reset", "rotate"])
def test_other_transports(inner, transport):
    compare(inner, transport, "short")


@pytest.mark.parametrize("transport", ["align", "rotate"])
def test_other_transports_on_the_long_side(transport):
    compare("adam", transport, "long")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_useless_gradients_at_a_refresh(bad):
    """At step 0 and at a later refresh; SGD, so that NaN does not stay in a moment."""
    grads = {name: gradients(shape, seed=1) for name, shape in SHAPES.items()}
    weights = {name: np.ones(shape) for name, shape in SHAPES.items()}
    for grad in grads.values():
        for step in (0, 2 * GAP):
            grad[step] = 0.0
            grad[step, 1, 2] = bad
    tx = gj.low_rank_projection(
        optax.identity(), RANK, refresh=GAP, state_dtype=jnp.float64,
        projector=gj.projectors.svd(signs="positive"), transport=gj.transport.keep(),
    )  # fmt: skip
    params = {name: jnp.asarray(w) for name, w in weights.items()}
    state, step = tx.init(params), jax.jit(tx.update, compiler_options=FAST)
    twins = {
        name: twin.Galore(shape, RANK, twin.sgd(), gap=GAP, basis_of=positive)
        for name, shape in SHAPES.items()
    }
    for i in range(STEPS):
        _, state = step({name: jnp.asarray(g[i]) for name, g in grads.items()}, state)
        for name, optimizer in twins.items():
            optimizer.step(np.zeros(SHAPES[name]), grads[name][i])
            np.testing.assert_allclose(
                state.projectors[name], optimizer.basis, atol=1e-9, err_msg=f"{name} at {i}"
            )


def test_schedules_of_scale_and_rate():
    grads = {"tall": gradients(SHAPES["tall"])}
    tx = gj.galore_sgd(
        lambda t: 0.1 / (1 + t), RANK, update_proj_gap=GAP, scale=lambda t: 1.0 / (2 + t),
        state_dtype=jnp.float64, projector=gj.projectors.svd(signs="positive"),
        transport=gj.transport.keep(),
    )  # fmt: skip
    found, _ = ours(tx, {"tall": np.ones(SHAPES["tall"])}, grads)
    expected, _ = twin.run(
        np.ones(SHAPES["tall"]), grads["tall"], RANK, twin.sgd(), gap=GAP, basis_of=positive,
        lr=lambda t: 0.1 / (1 + t), scale=lambda t: 1.0 / (2 + t),
    )  # fmt: skip
    np.testing.assert_allclose(found["tall"], expected, atol=1e-6)  # schedules are fp32


@dataclasses.dataclass(frozen=True)
class _Wrong(gj.transport.Transport):
    """Keeps the moments of the first basis only in name."""

    carries_state = True

    def carry(self, inner_state, treedef, moves):
        return jax.tree.map(lambda x: x * 0.99 if x.ndim else x, inner_state)


def test_a_wrong_transport_is_noticed(monkeypatch):
    monkeypatch.setitem(TRANSPORTS, "keep", _Wrong())
    with pytest.raises(AssertionError):
        compare("adam", "keep", "short")
