"""Codecs that keep one number per entry."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj
from galore_jax import codecs

KEY = np.zeros(2, np.uint32)  # none of these stores it
CODECS = [codecs.identity(), codecs.cast(jnp.bfloat16), codecs.cast("float16")]


@pytest.fixture(params=CODECS, ids=repr)
def codec(request):
    return request.param


def basis(*batch):
    rng = np.random.default_rng(0)
    return jnp.asarray(np.linalg.qr(rng.normal(size=(*batch, 12, 4)))[0], jnp.float32)


def test_encoding_what_was_decoded_changes_no_bit(codec):
    stored = codec.encode(basis(3), KEY)
    again = codec.encode(codec.decode(stored, jnp.float32, stored.shape), KEY)
    assert again.dtype == stored.dtype
    np.testing.assert_array_equal(again, stored)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_batch_axes_lead(codec, batch):
    stored = codec.encode(basis(*batch), KEY)
    assert stored.shape == (*batch, 12, 4)
    if batch:
        np.testing.assert_array_equal(stored[1], codec.encode(basis(*batch)[1], KEY))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_decodes_to_the_dtype_asked_for(codec, dtype):
    decoded = codec.decode(codec.encode(basis(), KEY), dtype, (12, 4))
    assert decoded.dtype == dtype
    np.testing.assert_allclose(decoded.astype(jnp.float32), basis(), atol=8e-3)


def test_identity_is_exact():
    np.testing.assert_array_equal(codecs.identity().encode(basis(), KEY), basis())


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")])
def test_one_spelling_of_a_dtype(dtype):
    codec = codecs.cast(dtype)
    assert codec == codecs.cast(jnp.bfloat16) and hash(codec) == hash(codecs.cast(jnp.bfloat16))
    assert codec != codecs.cast(jnp.float16)
    assert repr(codec) == "cast(dtype='bfloat16')"


@pytest.mark.parametrize("dtype", [jnp.int8, "int32", bool, "no such dtype", object(), None])
def test_only_floating_dtypes(dtype):
    with pytest.raises(TypeError, match="floating"):
        codecs.cast(dtype)


def test_the_lens_projects_and_lifts_with_what_is_stored(relaxed, codec):
    """Updates lie in the span of the decoded basis; bf16 is orthonormal to 1e-2."""
    rng = np.random.default_rng(1)
    gradients = rng.normal(size=(4, 2, 12, 8)).astype(np.float32)
    tx = gj.low_rank_projection(
        relaxed(optax.scale_by_adam()), 3, refresh=2, codec=codec, axes=gj.MatrixAxes()
    )
    state, update = tx.init({"w": jnp.zeros((2, 12, 8))}), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update({"w": gradient}, state)
        stored = state.projectors["w"]
        assert stored.dtype == codec.encode(basis(), KEY).dtype
        decoded = np.asarray(codec.decode(stored, jnp.float32, stored.shape), np.float64)
        overlap = np.swapaxes(decoded, -2, -1) @ decoded
        assert np.max(np.abs(overlap - np.eye(3))) < (1e-5 if codec == CODECS[0] else 1e-2)
        span = decoded @ np.linalg.inv(overlap) @ np.swapaxes(decoded, -2, -1)
        np.testing.assert_allclose(updates["w"] @ span, updates["w"], atol=1e-5)
        if codec != CODECS[0]:
            exact = np.linalg.qr(decoded)[0]
            assert np.max(np.abs(np.swapaxes(exact, -2, -1) @ exact - overlap)) > 1e-6
