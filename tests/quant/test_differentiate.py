"""Gradients of weights in codes are those of the decoded weights, at no memory for them."""

import dataclasses
import functools
import operator

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest

import galore_jax as gj
from galore_jax.quant import (
    DifferentiableWeight,
    QuantizedArray,
    value_and_grad,
)

quantize = jax.jit(gj.quant.quantize, static_argnames=("bits", "block"))
dequantize_params = jax.jit(gj.quant.dequantize_params)

LAYERS, BATCH, WIDTH, HIDDEN = 3, 5, 8, 13


def normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@functools.cache
def params(dtype="float32", bits=8):
    store = functools.partial(quantize, bits=bits, block=8)
    return {
        "up": store(normal(LAYERS, WIDTH, HIDDEN, dtype=dtype, seed=1)),
        "down": store(normal(LAYERS, HIDDEN, WIDTH, dtype=dtype, seed=2)),
        "bias": normal(LAYERS, HIDDEN, dtype=dtype, seed=3),
        "head": normal(WIDTH, 4, dtype=dtype, seed=4),
    }


def layer(x, weights):
    hidden = jnp.tanh(gj.matmul(x, weights["up"]) + weights["bias"][None])
    return x + gj.matmul(hidden, weights["down"])


def slices(stack):
    return [jax.tree.map(operator.itemgetter(i), stack) for i in range(LAYERS)]


def unrolled(x, stack):
    for weights in slices(stack):
        x = layer(x, weights)
    return x


def scanned(x, stack):
    return jax.lax.scan(lambda x, weights: (layer(x, weights), None), x, stack)[0]


def rematted(x, stack):
    body = jax.checkpoint(lambda x, weights: (layer(x, weights), None))
    return jax.lax.scan(body, x, stack)[0]


def loss(params, x, blocks=scanned):
    stack = {name: params[name] for name in ("up", "down", "bias")}
    y = gj.matmul(blocks(x, stack), params["head"])
    return jnp.mean(y.astype(jnp.float32) ** 2)


def decoded_astype(x, stack):
    """A model that decodes by itself."""
    for weights in slices(stack):
        hidden = jnp.tanh(x @ weights["up"].astype(x.dtype) + weights["bias"][None])
        x = x + hidden @ weights["down"].astype(x.dtype)
    return x


def assert_close(one, other, tolerance):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = (np.asarray(part.astype(jnp.float32)) for part in (a, b))
        assert np.max(np.abs(a)) > 0
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.max(np.abs(b)))


@pytest.mark.parametrize(
    ("blocks", "bits"), [(unrolled, 8), (scanned, 8), (rematted, 4), (decoded_astype, 8)]
)
def test_equals_jax_on_the_decoded_tree(blocks, bits):
    x = normal(BATCH, WIDTH)
    quantized = params(bits=bits)
    found = jax.jit(functools.partial(value_and_grad(loss), blocks=blocks))(quantized, x)
    exact = jax.jit(jax.value_and_grad(functools.partial(loss, blocks=blocks)))(
        dequantize_params(quantized), x
    )
    assert_close(found, exact, 1e-6)


def test_without_jit():
    tree = {"w": quantize(normal(4, 6)), "b": normal(6)}
    x = normal(3, 4, seed=5)

    def loss(params, x):
        return jnp.sum((gj.matmul(x, params["w"]) + params["b"][None]) ** 2)

    exact = jax.value_and_grad(loss)(dequantize_params(tree), x)
    assert_close(value_and_grad(loss)(tree, x), exact, 1e-6)


def test_bf16_weights_and_activations():
    x = normal(BATCH, WIDTH, dtype=jnp.bfloat16)
    quantized = params("bfloat16")
    value, grads = jax.jit(value_and_grad(loss))(quantized, x)
    assert grads["up"].dtype == jnp.bfloat16
    exact = jax.jit(jax.value_and_grad(loss))(dequantize_params(quantized), x)
    assert_close((value, grads), exact, 2e-2)


@pytest.mark.parametrize(
    ("weight", "activation"), [("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_the_product_has_the_dtype_of_the_activations(weight, activation):
    q = quantize(normal(4, 6, dtype=weight))
    x = normal(3, 4, dtype=activation)

    def loss(w, x):
        y = gj.matmul(x, w)
        assert y.dtype == activation
        return jnp.sum(y.astype(jnp.float32) ** 2)

    _, grad = value_and_grad(loss)(q, x)
    assert grad.dtype == weight and grad.shape == (4, 6)
    exact = jax.grad(loss)(dequantize_params(q), x)
    assert_close(grad, exact, 1e-6 if activation == "float32" else 2e-2)


def test_mapped_over_examples():
    """Per-example gradients of shared weights, and one set of weights per example."""
    x = normal(BATCH, 2, WIDTH)
    shared = jax.tree.map(lambda part: part[0], params()["up"])

    def loss(w, x):
        return jnp.sum(jnp.tanh(gj.matmul(x, w)))

    for weights, axis in ((shared, None), (quantize(normal(BATCH, WIDTH, 6), block=8), 0)):
        over = functools.partial(jax.vmap, in_axes=(axis, 0))
        found = jax.jit(over(value_and_grad(loss)))(weights, x)
        exact = jax.jit(over(jax.value_and_grad(loss)))(dequantize_params(weights), x)
        assert found[1].shape == (BATCH, *shared.shape) or axis == 0
        assert_close(found, exact, 1e-6)


@pytest.mark.parametrize(
    ("x", "w"),
    [
        ((WIDTH,), (WIDTH, 6)),
        ((2, 3, WIDTH), (WIDTH, 6)),
        ((4, 3, WIDTH), (4, WIDTH, 6)),
        ((5, 1, 3, WIDTH), (4, WIDTH, 6)),
        ((3, WIDTH), (4, WIDTH, 6)),
    ],
    ids=str,
)
def test_leading_axes_broadcast_as_in_matmul(x, w):
    x, q = normal(*x), quantize(normal(*w, seed=1), block=8)

    def loss(w, x):
        # The broadcasting is the point here.
        with jax.numpy_rank_promotion("allow"):
            return jnp.sum(jnp.sin(gj.matmul(x, w)))

    def both(weights, gradient):
        return jax.jit(lambda w, x: (gradient(w, x), jax.grad(loss, 1)(w, x)))(weights, x)

    found = both(q, value_and_grad(loss))
    exact = both(dequantize_params(q), jax.value_and_grad(loss))
    assert_close(found, exact, 1e-6)


def test_has_aux_and_other_arguments():
    tree = {"w": quantize(normal(4, 6)), "b": normal(6)}

    def loss(params, x, *, scale):
        y = gj.matmul(x, params["w"]) + params["b"][None]
        return scale * jnp.sum(y), {"y": y}

    x = normal(3, 4)
    found = jax.jit(value_and_grad(loss, has_aux=True))(tree, x, scale=2.0)
    exact = jax.value_and_grad(loss, has_aux=True)(dequantize_params(tree), x, scale=2.0)
    assert_close(found, exact, 1e-6)


def test_activations_get_their_gradient_too():
    """Through a differentiated weight, and through a bare one, which is a constant."""
    q, x = quantize(normal(4, 6)), normal(3, 4, seed=1)

    def loss(x, w):
        return jnp.sum(jnp.sin(gj.matmul(x, w)))

    exact = jax.grad(loss)(x, dequantize_params(q))
    assert_close(jax.grad(loss)(x, q), exact, 1e-6)
    seen = DifferentiableWeight(q, jnp.zeros(q.shape))
    assert (seen.shape, seen.ndim, seen.dtype) == (q.shape, 2, jnp.float32)
    assert_close(jax.grad(loss)(x, seen), exact, 1e-6)


def test_a_bare_stored_weight_is_a_constant():
    q = quantize(normal(4, 6))
    x = normal(3, 4)

    def loss(scales):
        weight = dataclasses.replace(q, scales=scales)
        return jnp.sum(gj.matmul(x, weight))

    np.testing.assert_array_equal(jax.grad(loss)(q.scales), 0)
    np.testing.assert_array_equal(gj.matmul(x, q), x @ dequantize_params(q))


def test_the_model_sees_what_can_be_differentiated():
    seen = []

    def loss(params):
        seen.append(params)
        return jnp.sum(params["w"].astype(jnp.float32) * 3) + jnp.sum(params["b"])

    tree = {"w": quantize(normal(4, 6)), "b": normal(6)}
    _, grads = value_and_grad(loss)(tree)
    assert isinstance(seen[0]["w"], DifferentiableWeight)
    assert not isinstance(seen[0]["b"], DifferentiableWeight)
    np.testing.assert_array_equal(grads["w"], np.full((4, 6), 3.0))
    np.testing.assert_array_equal(grads["b"], np.ones(6))


def test_an_unused_weight_has_gradient_zero():
    tree = {"w": quantize(normal(4, 6)), "u": quantize(normal(2, 3))}
    _, grads = value_and_grad(lambda p: jnp.sum(gj.matmul(jnp.ones((1, 4)), p["w"])))(tree)
    np.testing.assert_array_equal(grads["u"], np.zeros((2, 3)))


def residual_shapes(blocks, quantized, x, capsys):
    """Shapes of the floating arrays that the backward pass keeps."""

    def loss_of_probes(probes):
        tree = jax.tree.map(
            lambda leaf, probe: (
                DifferentiableWeight(leaf, probe) if isinstance(leaf, QuantizedArray) else probe
            ),
            quantized,
            probes,
            is_leaf=lambda node: isinstance(node, QuantizedArray),
        )
        return loss(tree, x, blocks=blocks)

    probes = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), dequantize_params(quantized))
    jax.ad_checkpoint.print_saved_residuals(loss_of_probes, probes)
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        # What is an argument, or a constant like the codes, exists anyway.
        if " argument " not in line and " constant" not in line
    ]
    return [line.split()[0] for line in lines]


@pytest.mark.parametrize("blocks", [unrolled, scanned, rematted])
def test_no_decoded_weight_is_kept_for_the_backward_pass(blocks, capsys):
    shapes = residual_shapes(blocks, params(), normal(BATCH, WIDTH), capsys)
    for matrix in (f"{WIDTH},{HIDDEN}]", f"{HIDDEN},{WIDTH}]"):
        assert f"f32[{matrix}" not in shapes and f"f32[{LAYERS},{matrix}" not in shapes
    assert shapes


def test_a_decoded_weight_would_be_seen(capsys):
    """The measure of the test above: a model that decodes by itself keeps its weights."""
    shapes = residual_shapes(decoded_astype, params(), normal(BATCH, WIDTH), capsys)
    assert f"f32[{WIDTH},{HIDDEN}]" in shapes


def test_temporary_memory_under_scan():
    """One layer is decoded at a time: far less than the stack of decoded weights."""
    layers, width = 16, 128
    stack = jax.eval_shape(quantize, jax.ShapeDtypeStruct((layers, width, width), jnp.float32))

    def loss(stack, x):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(gj.matmul(x, w)), None))
        return jnp.sum(jax.lax.scan(body, x, stack)[0])

    compiled = (
        jax.jit(value_and_grad(loss))
        .lower(stack, jax.ShapeDtypeStruct((2, width), jnp.float32))
        .compile()
    )
    memory = compiled.memory_analysis()
    stack_bytes = layers * width * width * 4
    assert memory.output_size_in_bytes >= stack_bytes
    assert memory.temp_size_in_bytes <= 0.5 * stack_bytes, memory
