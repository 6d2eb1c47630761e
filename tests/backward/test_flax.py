"""Layers of Flax whose kernels arrive as projected weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from small_models import distance, normal

import galore_jax as gj
from galore_jax.backward import dot_general, promote_dtype

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction

X, Y = normal((7, 10)), normal((7, 6), 1)
TX = gj.galore_adamw(3e-2, 3, update_proj_gap=3, axes={"heads": gj.MatrixAxes(0, (1, 2))})


class NNX(nnx.Module):
    def __init__(self, rngs, **hooks):
        self.up = nnx.Linear(10, 12, rngs=rngs, **hooks)
        self.heads = nnx.LinearGeneral(12, (2, 4), rngs=rngs, **hooks)
        self.down = nnx.Linear(8, 6, use_bias=False, rngs=rngs, **hooks)

    def __call__(self, x):
        h = jnp.tanh(self.heads(jnp.tanh(self.up(x))))
        return self.down(h.reshape(*h.shape[:-2], 8))


class Linen(linen.Module):
    hooks: tuple = ()

    @linen.compact
    def __call__(self, x):
        dense = functools.partial(linen.Dense, **dict(self.hooks))
        return dense(6, use_bias=False, name="down")(jnp.tanh(dense(12, name="up")(x)))


def train(value_and_grad, params, steps=7):
    state = TX.init(params)

    @jax.jit
    def step(params, state):
        value, gradient = value_and_grad(params, state, X, Y)
        updates, state = TX.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value, gradient

    for _ in range(steps):
        params, state, value, gradient = step(params, state)
    return params, value, gradient


def test_nnx():
    hooked = NNX(nnx.Rngs(0), promote_dtype=promote_dtype, dot_general=dot_general)
    graph, params = nnx.split(hooked)
    plain_graph, _ = nnx.split(NNX(nnx.Rngs(0)))

    def loss(graph):
        return lambda params, x, y: jnp.mean((nnx.merge(graph, params)(x) - y) ** 2)

    ours, value, gradient = train(gj.projected_value_and_grad(loss(graph), TX), params)
    plain = jax.value_and_grad(loss(plain_graph))
    theirs, expected, _ = train(lambda p, _, *batch: plain(p, *batch), params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs) and distance(ours, theirs) < 1e-5
    kinds = [type(leaf) for leaf in gj.leaves.Leaves.of(gradient).values]
    assert kinds.count(gj.ProjectedGradient) == 3
    # The hooks change nothing for arrays.
    assert loss(graph)(params, X, Y) == loss(plain_graph)(params, X, Y)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.sampled(1)
def test_linen(quantized):
    hooks = (("promote_dtype", promote_dtype), ("dot_general", dot_general))
    plain, hooked = Linen(), Linen(hooks)
    params = start = hooked.init(jax.random.key(0), X)
    if quantized:
        params = gj.quant.quantize_params(params)

    def loss(model):
        return lambda params, x, y: jnp.mean((model.apply(params, x) - y) ** 2)

    if quantized:  # one step: codes need stochastic rounding
        state = TX.init(params)
        value, gradient = gj.projected_value_and_grad(loss(hooked), TX)(params, state, X, Y)
        start = gj.quant.dequantize_params(params)
        expected, exact = jax.value_and_grad(loss(plain))(start, X, Y)
        updates, _ = TX.update(gradient, state, params)
        wanted, _ = TX.update(exact, TX.init(start), start)
        assert distance(updates, wanted) < 1e-4
    else:
        theirs = jax.value_and_grad(loss(plain))
        ours, value, _ = train(gj.projected_value_and_grad(loss(hooked), TX), params)
        wanted, expected, _ = train(lambda p, _, *batch: theirs(p, *batch), params)
        assert distance(ours, wanted) < 1e-5
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_linen_boxes():
    """Parameters with names of mesh axes keep them, and so do their gradients."""
    params = {
        "up": linen.Partitioned(normal((10, 12)), names=("embed", "mlp")),
        "down": linen.Partitioned(normal((12, 6)), names=("mlp", "embed")),
    }

    def loss(params, x, y):
        up, down = linen.meta.unbox(params["up"]), linen.meta.unbox(params["down"])
        return jnp.mean((gj.matmul(jnp.tanh(gj.matmul(x, up)), down) - y) ** 2)

    ours, value, gradient = train(gj.projected_value_and_grad(loss, TX), params)
    plain = jax.value_and_grad(loss)
    theirs, expected, _ = train(lambda p, _, *batch: plain(p, *batch), params)
    assert distance(ours, theirs) < 1e-5 and abs(value - expected) < 1e-5
    assert isinstance(gradient["up"], linen.Partitioned) and gradient["up"].names == (
        "embed",
        "mlp",
    )
    assert isinstance(gradient["up"].value, gj.ProjectedGradient)


@pytest.mark.parametrize("option", ["preferred_element_type", "out_sharding"])
def test_options_of_the_product_are_refused_by_name(option):
    params = {"kernel": normal((10, 12))}

    def loss(params, x):
        numbers = (((1,), (0,)), ((), ()))
        return jnp.sum(dot_general(x, params["kernel"], numbers, **{option: jnp.float32}))

    with pytest.raises(ValueError, match=rf"leaf 'kernel' .*{option}"):
        gj.projected_value_and_grad(loss, TX)(params, TX.init(params), X)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_promote_dtype_is_that_of_flax(dtype):
    arrays = (jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float32), None)
    ours = promote_dtype(arrays, dtype=dtype)
    for theirs in (
        nnx.nn.dtypes.promote_dtype(arrays, dtype=dtype),
        linen.dtypes.promote_dtype(*arrays, dtype=dtype),
        promote_dtype(*arrays, dtype=dtype),
    ):
        assert [x if x is None else x.dtype for x in theirs] == [
            x if x is None else x.dtype for x in ours
        ]
    integers = jnp.ones(2, jnp.int32)
    assert promote_dtype(integers, None)[0].dtype == jnp.float32
    assert promote_dtype(integers, None, inexact=False)[0].dtype == jnp.int32
