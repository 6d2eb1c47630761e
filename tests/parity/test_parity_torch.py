"""The recorded trajectories of the released PyTorch `GaLoreAdamW`, on transposed weights.

The released code decays the weight after the update, so the decay is applied here, in its order.
It adds eps before the bias is corrected; `released_adam` does, being this file's inner.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj

# Tests compile far longer than they run.
FAST = {"xla_backend_optimization_level": 0}

with np.load(Path(__file__).parents[1] / "reference" / "torch_trajectories.npz") as _file:
    RECORDED = dict(_file)
META = json.loads(str(RECORDED["meta"]))
CASES = META["cases"]
WITHOUT_SIGNS = [name for name, case in CASES.items() if case["family"] in ("within", "across")]
KEPT = [name for name, case in CASES.items() if case["family"] == "kept"]
TOLERANCE = 2e-5


class ReleasedAdamState(NamedTuple):
    count: jax.Array
    mu: Any
    nu: Any


gj.transport.register_moment(ReleasedAdamState, first="mu", second="nu")


def released_adam(b1, b2, eps):
    """sqrt(1 - b2ᵗ) / (1 - b1ᵗ) · m / (sqrt(v) + eps)."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return ReleasedAdamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(grads, state, params=None):
        del params
        t = (state.count + 1).astype(jnp.float32)
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, grads, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g * g, grads, state.nu)
        factor = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        direction = jax.tree.map(lambda m, v: factor * m / (jnp.sqrt(v) + eps), mu, nu)
        return direction, ReleasedAdamState(state.count + 1, mu, nu)

    return optax.GradientTransformation(init, update)


def error(name, *, inner=None, decay_after=True, projector=None, **changes):
    """Largest distance of our weights from the recorded ones."""
    case = CASES[name] | changes
    shape = case["shape"]
    lens = gj.low_rank_projection(
        inner or released_adam(case["b1"], case["b2"], case["eps"]),
        case["rank"],
        refresh=case["gap"],
        projector=projector or gj.projectors.svd(),
        transport=changes.get("transport", gj.transport.keep()),
        scale=case["scale"],
        side=case["side"],
        targets=gj.all_matrices,
    )
    weight = jnp.asarray(RECORDED[f"weight/{shape}"].T)
    state, worst = lens.init(weight), 0.0
    step = jax.jit(lens.update, compiler_options=FAST)
    for grad, expected in zip(RECORDED[f"grads/{shape}"], RECORDED[f"weights/{name}"], strict=True):
        decay = case["lr"] * case["weight_decay"]
        update, state = step(jnp.asarray(grad.T), state)
        moved = weight - case["lr"] * update
        weight = moved * (1 - decay) if decay_after else moved - decay * weight
        worst = max(worst, float(jnp.max(jnp.abs(weight - expected.T))))
    return worst


@pytest.mark.parametrize("name", WITHOUT_SIGNS)
def test_follows_the_released_code(name):
    assert error(name) < TOLERANCE


@pytest.mark.parametrize("name", [n for n in WITHOUT_SIGNS if CASES[n]["proj_type"] == "std"])
def test_std_is_side_short(name):
    assert error(name, side="short") < TOLERANCE


class WithRecordedSigns(gj.projectors.Projector):
    """Our SVD with the signs of the recording; LAPACK and PyTorch are free to choose others."""

    canonical_columns = True

    def __init__(self, name):
        self._name = name

    def basis(self, gradient, rank, **options):
        basis = gj.projectors.svd().basis(gradient, rank, **options)
        overlaps = jnp.einsum("pr,npr->nr", basis, RECORDED[f"bases/{self._name}"])
        # The recorded basis of this refresh is the one that spans the same space.
        which = jnp.argmax(jnp.sum(jnp.abs(overlaps), axis=1))
        return basis * jnp.sign(overlaps[which])[None, :]


@pytest.mark.parametrize("name", KEPT)
def test_keeps_moments_across_refreshes_as_the_released_code_does(name):
    assert error(name, projector=WithRecordedSigns(name)) < TOLERANCE


@pytest.mark.parametrize("transport", [gj.transport.reset(), gj.transport.rotate()], ids=str)
def test_the_kept_family_tells_transports_apart(transport):
    name = KEPT[0]
    assert error(name, projector=WithRecordedSigns(name), transport=transport) > 1e-4


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("within-tall-std-r4", {"side": "output"}),
        ("within-square-std-r4", {"side": "output"}),
        ("within-wide-std-r4", {"decay_after": False}),
        ("within-tall-std-r4", {"scale": 1.0}),
        ("across-tall-std-r4", {"gap": 1000}),
    ],
)
def test_the_recording_tells_wrong_code_from_right(name, changes):
    assert error(name, **changes) > 1e-4


def test_optax_adam_differs_by_the_place_of_eps_only():
    """Where eps is 1e-8 its place does not matter, and the galore alias itself follows."""
    names = [n for n in WITHOUT_SIGNS if CASES[n]["eps"] == 1e-8 and CASES[n]["rank"] == 4]
    assert names
    with jax.numpy_dtype_promotion("standard"):
        for name in names[:2]:
            assert error(name, inner=optax.scale_by_adam(0.9, 0.999, 1e-8)) < TOLERANCE
