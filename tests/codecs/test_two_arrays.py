"""A codec may store a basis as several arrays: whoever walks over leaves has to know."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_jax as gj
from galore_jax.codecs.base import Codec

pytestmark = pytest.mark.standard_promotion


@dataclasses.dataclass(frozen=True)
class Halves(Codec):
    """Rows of a basis in two arrays."""

    def encode(self, basis, key):
        return basis[..., ::2, :], basis[..., 1::2, :]

    def decode(self, stored, dtype, shape):
        return jnp.stack(stored, axis=-2).reshape(shape).astype(dtype)


PARAMS = {"w": np.arange(128.0, dtype=np.float32).reshape(16, 8) ** 0.5, "b": np.ones(3, "f")}


@pytest.fixture
def halves():
    tx = gj.galore_adamw(1e-2, rank=2, codec=Halves())
    whole = gj.galore_adamw(1e-2, rank=2)
    params = jax.tree.map(jnp.asarray, PARAMS)
    return params, tx, whole


def states(params, *optimizers):
    return [jax.jit(tx.update)(params, tx.init(params), params)[1] for tx in optimizers]


def test_every_part_belongs_to_its_leaf(halves):
    params, tx, whole = halves
    ours, theirs = (gj.memory.report(s, params) for s in states(params, tx, whole))
    assert ours.projectors == theirs.projectors > 0
    assert [x.path for x in ours.leaves] == [x.path for x in theirs.leaves]


def test_the_energy_is_that_of_the_basis(halves):
    params, tx, whole = halves
    ours, theirs = (gj.captured_energy(params, s) for s in states(params, tx, whole))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)
    assert 0.5 < float(ours["w"]) <= 1


def test_projected_gradients_are_those_of_the_basis(halves):
    params, tx, whole = halves

    def loss(params, x):
        return jnp.sum(jnp.sin(gj.matmul(x, params["w"]))) + jnp.sum(params["b"])

    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 16)), jnp.float32)
    (_, ours), (_, theirs) = (
        gj.projected_value_and_grad(loss, t)(params, s, x)
        for t, s in zip((tx, whole), states(params, tx, whole), strict=True)
    )
    chex.assert_trees_all_close(ours["w"].value, theirs["w"].value, rtol=1e-5)
