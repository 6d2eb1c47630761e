"""`keep`: moments stay column for column, so columns must keep their meaning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import numpy_galore as twin

import galore_jax as gj
from galore_jax import projectors

CANONICAL = (projectors.svd, projectors.gram_eigh)


def test_refused_unless_columns_are_canonical(projector):
    options = {"projector": projector, "transport": gj.transport.keep()}
    if isinstance(projector, CANONICAL):
        gj.low_rank_projection(optax.identity(), 2, **options)
        return
    with pytest.raises(ValueError, match="align") as error:
        gj.low_rank_projection(optax.identity(), 2, **options)
    assert type(projector).__name__ in str(error.value) and "keep" in str(error.value)


def test_refused_with_the_default_projector():
    for make in (gj.galore, gj.galore_adamw, gj.galore_lion, gj.galore_sgd, gj.galore_adafactor):
        with pytest.raises(ValueError, match="randomized_svd"):
            make(1e-2, 2, transport=gj.transport.keep())


@pytest.mark.parametrize(
    "shape, side",
    [((10, 6), "short"), ((10, 6), "long"), ((6, 10), "input"), ((6, 10), "output")],
)
def test_equals_the_twin(relaxed, shape, side):
    rng = np.random.default_rng(0)
    gradients = (rng.normal(size=shape) + 0.3 * rng.normal(size=(9, *shape))).astype(np.float32)
    projector = projectors.svd(signs="positive")
    tx = gj.low_rank_projection(
        relaxed(optax.scale_by_adam(eps=1e-2)), 3, refresh=4, side=side, scale=0.5,
        projector=projector, transport=gj.transport.keep(),
    )  # fmt: skip

    def positive(gradient, rank, axis):
        basis = twin.singular_vectors(gradient, rank, axis)
        return basis * np.sign(basis[np.argmax(np.abs(basis), axis=0), np.arange(rank)])

    oracle = twin.Galore(
        shape, 3, twin.adam(eps=1e-2), gap=4, side=side, scale=0.5, lr=1.0, basis_of=positive
    )
    state, update = tx.init({"w": jnp.zeros(shape)}), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update({"w": gradient}, state)
        np.testing.assert_allclose(updates["w"], -oracle.step(np.zeros(shape), gradient), atol=2e-4)
        np.testing.assert_allclose(state.projectors["w"], oracle.basis, atol=2e-4)
