"""Flax NNX, Flax Linen, and trees of dataclasses that hold None."""

from __future__ import annotations

import dataclasses

import conformance_cases as cc
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import galore_jax as gj

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def promotion_as_flax_and_optax_need_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


INPUT = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)
TARGET = jnp.sin(INPUT @ jnp.ones((6, 4)))


class Network(nnx.Module):
    """Two projected kernels, and a stack of two layers that are scanned."""

    def __init__(self, rngs, spread=lambda init, names: init):
        init = nnx.initializers.lecun_normal()
        self.up = nnx.Linear(6, 10, kernel_init=spread(init, (None, "model")), rngs=rngs)

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs):
            return nnx.Linear(10, 10, kernel_init=spread(init, ("model", None)), rngs=rngs)

        self.layers = stack(rngs)
        self.down = nnx.Linear(10, 4, kernel_init=spread(init, ("model", None)), rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, layer):
            return jnp.tanh(layer(x))

        return self.down(through(self.up(x), self.layers))


def loss_fn(model):
    return jnp.mean((model(INPUT) - TARGET) ** 2)


OPTIONS = {"rank": 3, "update_proj_gap": 2, "axes": {"layers": gj.MatrixAxes(-2, -1)}}


def train(model, tx):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    run = nnx.jit(step)
    before = jax.tree.structure(nnx.state(optimizer))
    losses = [float(run(model, optimizer)) for _ in range(3)]
    assert jax.tree.structure(nnx.state(optimizer)) == before
    return losses, optimizer


@pytest.mark.parametrize("alias", [gj.galore_adamw, gj.galore_adafactor])
def test_nnx_optimizer(alias):
    with nnx.use_eager_sharding(False):
        model = Network(nnx.Rngs(0))
        losses, optimizer = train(model, alias(3e-2, weight_decay=1e-3, **OPTIONS))
    assert losses[-1] < losses[0]
    assert int(optimizer.step[...]) == 3
    lens = cc.projecting_lens(optimizer.opt_state)
    assert int(jax.tree.leaves(lens.count)[0]) == 3
    shapes = {tuple(leaf.shape) for leaf in jax.tree.leaves(lens.projectors) if leaf.ndim > 0}
    # up (6, 10): input; layers (10, 10) squares; down (10, 4): output
    assert shapes == {(6, 3), (2, 10, 3), (4, 3)}


def test_nnx_optimizer_without_jit():
    with nnx.use_eager_sharding(False):
        model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, gj.galore_sgd(1e-1, 2), wrt=nnx.Param)
        before = float(loss_fn(model))
        optimizer.update(model, nnx.grad(loss_fn)(model))
    assert float(loss_fn(model)) < before


def test_nnx_parameters_are_the_same_as_plain_arrays():
    """Boxed or not, a leaf is the same leaf with the same path: same keys, same numbers."""
    with nnx.use_eager_sharding(False):
        model = Network(nnx.Rngs(0))
    boxed = nnx.state(model, nnx.Param)
    plain = nnx.to_pure_dict(boxed)
    tx = gj.galore_adamw(1e-2, **OPTIONS)
    step = jax.jit(tx.update)
    update, state = step(boxed, tx.init(boxed), boxed)
    expected, plain_state = step(plain, tx.init(plain), plain)
    assert jax.tree.structure(update) == jax.tree.structure(boxed)
    for one, other in zip(jax.tree.leaves(update), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(plain_state), strict=True):
        np.testing.assert_array_equal(one, other)


def one_device_mesh(kind):
    return jax.make_mesh(
        (1,), ("model",), axis_types=(getattr(jax.sharding.AxisType, kind),),
        devices=jax.devices()[:1],
    )  # fmt: skip


def test_nnx_with_sharding_metadata():
    with jax.set_mesh(one_device_mesh("Auto")), nnx.logical_axis_rules([("layers", None)]):
        model = Network(nnx.Rngs(0), spread=nnx.with_partitioning)
        losses, optimizer = train(model, gj.galore_adamw(3e-2, **OPTIONS))
    assert losses[-1] < losses[0]
    assert int(jax.tree.leaves(cc.projecting_lens(optimizer.opt_state).count)[0]) == 3
    with nnx.use_eager_sharding(False):
        bare, _ = train(Network(nnx.Rngs(0)), gj.galore_adamw(3e-2, **OPTIONS))
    np.testing.assert_allclose(losses, bare, atol=1e-5)


def test_update_of_nnx_parameters_on_an_explicit_mesh():
    """The update alone; a model that multiplies sharded axes has to say how, and ours does not."""
    tx = gj.galore_adamw(1e-2, **OPTIONS)
    with jax.set_mesh(one_device_mesh("Explicit")), nnx.logical_axis_rules([("layers", None)]):
        params = nnx.state(Network(nnx.Rngs(0), spread=nnx.with_partitioning), nnx.Param)
        state = tx.init(params)
        update, after = jax.jit(tx.update)(params, state, params)
    assert jax.tree.structure(update) == jax.tree.structure(params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for leaf in jax.tree.leaves(update):
        assert np.all(np.isfinite(leaf))


class Linen(nn.Module):
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        if self.boxed:
            init = nn.with_partitioning(init, (None, "model"))
        x = jnp.tanh(nn.Dense(10, kernel_init=init, name="up")(x))
        return nn.Dense(4, kernel_init=init, name="down")(x)


def linen_loss(params, apply):
    return jnp.mean((apply({"params": params}, INPUT) - TARGET) ** 2)


@pytest.mark.parametrize("alias", [gj.galore_adamw, gj.galore_lion, gj.galore_adafactor])
def test_linen_train_state_with_and_without_boxes(alias):
    def run(boxed):
        model = Linen(boxed)
        params = model.init(jax.random.key(0), INPUT)["params"]
        tx = alias(1e-2, rank=2, update_proj_gap=2, weight_decay=1e-3)
        state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

        @jax.jit
        def step(state):
            loss, grads = jax.value_and_grad(linen_loss)(state.params, state.apply_fn)
            return loss, state.apply_gradients(grads=grads)

        before, losses = jax.tree.structure(state), []
        for _ in range(3):
            loss, state = step(state)
            losses.append(float(loss))
            assert jax.tree.structure(state) == before
        assert losses[-1] < losses[0]
        return state

    plain, boxed = run(False), run(True)
    kernel = boxed.params["up"]["kernel"]
    assert isinstance(kernel, nn.Partitioned) and kernel.names == (None, "model")
    for one, other in zip(
        jax.tree.leaves(plain.params), jax.tree.leaves(boxed.params), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert len(cc.bases(boxed.opt_state)) == 2
    assert set(cc.bases(boxed.opt_state)) == set(cc.bases(plain.opt_state))


def test_linen_updates_keep_their_boxes():
    params = Linen(True).init(jax.random.key(0), INPUT)["params"]
    tx = gj.low_rank_projection(optax.scale_by_adam(), 2)
    update, _ = tx.update(params, tx.init(params))
    assert jax.tree.structure(update) == jax.tree.structure(params)
    assert update["down"]["kernel"].names == (None, "model")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    weight: jax.Array
    bias: jax.Array | None
    activation: str = dataclasses.field(default="tanh", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    layers: list[Layer]
    norm: Layer | None


@pytest.mark.parametrize("alias", [gj.galore_adamw, gj.galore_adafactor, gj.galore_sgd])
def test_dataclasses_with_none(alias):
    keys = jax.random.split(jax.random.key(0), 2)
    model = Model(
        [
            Layer(jax.random.normal(keys[0], (6, 10)) / 3, None),
            Layer(jax.random.normal(keys[1], (10, 4)) / 3, jnp.zeros(4)),
        ],
        None,
    )
    tx = alias(1e-2, 3, update_proj_gap=2, weight_decay=1e-3)
    state = tx.init(model)

    @jax.jit
    def step(model, state):
        def loss(model):
            first, second = model.layers
            out = jnp.tanh(INPUT @ first.weight) @ second.weight + second.bias
            return jnp.mean((out - TARGET) ** 2)

        value, grads = jax.value_and_grad(loss)(model)
        updates, state = tx.update(grads, state, model)
        return value, optax.apply_updates(model, updates), state

    before, losses = cc.signature((model, state)), []
    for _ in range(4):
        value, model, state = step(model, state)
        losses.append(float(value))
        assert cc.signature((model, state)) == before
    assert losses[-1] < losses[0]
    assert model.layers[0].bias is None and model.norm is None
    lens = cc.projecting_lens(state)
    shapes = sorted(x.shape for x in jax.tree.leaves(lens.projectors) if x.ndim > 0)
    assert shapes == [(4, 3), (6, 3)]
