"""Whole trees of weights, in codes and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_jax as gj
from galore_jax.quant import QuantizedArray, dequantize, dequantize_params, quantize_params


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


PARAMS = {
    "embed": {"embedding": normal(12, 8)},
    "layers": {
        "attention": {"q": normal(2, 8, 8), "bias": normal(2, 8)},
        "norm": {"scale": normal(2, 8)},
        "up": {"kernel": normal(8, 20, dtype=jnp.bfloat16), "bias": normal(20)},
    },
    "lm_head": normal(8, 12),
    "position": jnp.arange(6).reshape(2, 3),
    "temperature": 0.5,
}
WEIGHTS = {"layers/attention/q", "layers/up/kernel"}


def chosen(tree):
    with_path, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, QuantizedArray)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in with_path
        if isinstance(leaf, QuantizedArray)
    }


def test_default_targets():
    """Embeddings, head, norms and biases stay; so does what is no floating matrix."""
    quantized = quantize_params(PARAMS)
    assert chosen(quantized) == WEIGHTS
    assert quantized["embed"]["embedding"] is PARAMS["embed"]["embedding"]
    assert quantized["lm_head"] is PARAMS["lm_head"]
    assert quantized["position"] is PARAMS["position"]
    assert quantized["temperature"] == 0.5
    kernel = quantized["layers"]["up"]["kernel"]
    assert (kernel.bits, kernel.block, kernel.dtype) == (8, 256, jnp.bfloat16)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("kernel|q$", WEIGHTS),
        ("embed", {"embed/embedding"}),
        ("nothing", set()),
        (lambda path, leaf: leaf.shape[-1] == 12, {"lm_head"}),
        # A norm with a matrix' shape is taken if it is asked for.
        ("norm", {"layers/norm/scale"}),
    ],
)
def test_targets(targets, expected):
    assert chosen(quantize_params(PARAMS, targets=targets)) == expected


def test_all_matrices():
    floating = {name: leaf for name, leaf in PARAMS.items() if name != "position"}
    assert chosen(quantize_params(floating, targets=gj.all_matrices)) == {
        *WEIGHTS,
        "embed/embedding",
        "lm_head",
        "layers/attention/bias",
        "layers/norm/scale",
    }


@pytest.mark.parametrize("targets", ["position", gj.all_matrices])
def test_an_integer_leaf_that_was_asked_for(targets):
    with pytest.raises(TypeError, match=r"'position'.*int32.*floating"):
        quantize_params(PARAMS, targets=targets)


@pytest.mark.parametrize(
    ("error", "options", "pattern"),
    [
        (ValueError, {"bits": 3}, "`bits`.*3"),
        (ValueError, {"block": 0}, "`block`.*0"),
        (TypeError, {"block": 1.5}, "`block`.*1.5"),
        (TypeError, {"targets": 3}, "`targets`.*3"),
        (ValueError, {"targets": "("}, "`targets`.*regex"),
    ],
)
def test_errors_come_before_any_leaf(error, options, pattern):
    with pytest.raises(error, match=pattern):
        quantize_params({}, **options)


@pytest.mark.parametrize("bits", [8, 4])
def test_round_trip(bits):
    quantized = quantize_params(PARAMS, bits=bits, block=8)
    restored = dequantize_params(quantized)
    assert jax.tree.structure(restored) == jax.tree.structure(PARAMS)
    for path, old in jax.tree_util.tree_flatten_with_path(PARAMS)[0]:
        new = restored
        for part in path:
            new = new[part.key]
        if jax.tree_util.keystr(path, simple=True, separator="/") not in WEIGHTS:
            assert new is old
            continue
        assert new.shape == old.shape and new.dtype == old.dtype
        old = np.asarray(old.astype(jnp.float32))
        error = np.abs(np.asarray(new.astype(jnp.float32)) - old)
        assert 0 < np.max(error) <= np.ptp(old) / (2**bits - 1) / 2 * 1.01 + 0.01


def test_what_is_quantized_already():
    """Once more at the same width it stays as it is; at another one it is converted."""
    once = quantize_params(PARAMS, block=8)
    twice = quantize_params(once, block=8)
    assert jax.tree.structure(twice) == jax.tree.structure(once)
    q = "layers", "attention", "q"
    one, two = once[q[0]][q[1]][q[2]], twice[q[0]][q[1]][q[2]]
    for part in ("codes", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(one, part), getattr(two, part))
    narrow = quantize_params(once, bits=4, block=4)
    assert chosen(narrow) == WEIGHTS
    narrow = narrow[q[0]][q[1]][q[2]]
    assert (narrow.bits, narrow.block, narrow.shape) == (4, 4, (2, 8, 8))
    np.testing.assert_allclose(dequantize(narrow), dequantize(one), atol=0.3)


def test_abstract():
    shapes = jax.eval_shape(quantize_params, jax.eval_shape(lambda: PARAMS))
    assert chosen(shapes) == WEIGHTS
    restored = jax.eval_shape(dequantize_params, shapes)
    assert restored["layers"]["up"]["kernel"] == jax.ShapeDtypeStruct((8, 20), jnp.bfloat16)


def test_other_leaves_are_left_alone_by_dequantize():
    tree = {"a": normal(3, 4), "b": None, "c": [1.5, jnp.arange(3)]}
    restored = dequantize_params(tree)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    assert restored["a"] is tree["a"] and restored["c"][1] is tree["c"][1]
