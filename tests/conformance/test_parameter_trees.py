"""Flax NNX, Flax Linen, and trees of dataclasses that hold None."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import conformance_cases as cc
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from jax.sharding import PartitionSpec as P

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
@pytest.mark.sampled(1)
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


WIDE = jnp.asarray(np.random.default_rng(1).normal(size=(16, 8)), jnp.float32)
RULES = (("embed", "data"), ("mlp", "model"), ("layers", None))
STEPS = 5


def eight_devices(kind):
    return jax.make_mesh(
        (4, 2), ("data", "model"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2
    )


def wide_loss(model):
    return jnp.mean((model(WIDE) - jnp.sin(WIDE)) ** 2)


def in_shards(tx, shardings):
    """For who calls `init` himself: `nnx.Optimizer`, `TrainState.create`."""
    return tx._replace(init=lambda params: gj.init_sharded(tx, params, shardings))


class LogicalNetwork(nnx.Module):
    """Kernels with logical axes; `whole` is how their products are to be sharded, if they say."""

    def __init__(self, rngs, whole=None):
        init = nnx.initializers.lecun_normal()

        def linear(rngs, n_in, n_out, axes):
            return nnx.Linear(n_in, n_out, kernel_init=nnx.with_partitioning(init, axes), rngs=rngs)

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs):
            return linear(rngs, 16, 16, ("mlp", "embed"))

        self.whole = whole
        self.up = linear(rngs, 8, 16, ("embed", "mlp"))
        self.layers = stack(rngs)
        self.down = linear(rngs, 16, 8, ("mlp", "embed"))

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, layer):
            return jnp.tanh(layer(x, out_sharding=self.whole))

        x = through(self.up(x, out_sharding=self.whole), self.layers)
        return self.down(x, out_sharding=self.whole)


def train_nnx(model, tx):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(wide_loss)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(STEPS)]
    return losses, jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param))), optimizer


def assert_close(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


LENS = {"rank": 3, "update_proj_gap": 2, "axes": {"layers": gj.MatrixAxes()}}
SHARDED = [
    ("Auto", gj.galore_adamw(1e-2, **LENS, weight_decay=1e-3)),
    ("Auto", gj.galore_adafactor(1e-2, **LENS)),
    ("Explicit", gj.galore_adamw(1e-2, **LENS)),
]


@pytest.mark.parametrize("kind, tx", SHARDED, ids=["adamw", "adafactor", "explicit"])
@pytest.mark.sampled(1)
def test_nnx_on_a_mesh_by_logical_axes(kind, tx):
    with nnx.use_eager_sharding(False):
        losses, params, _ = train_nnx(LogicalNetwork(nnx.Rngs(0)), tx)
    mesh = eight_devices(kind)
    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
        model = LogicalNetwork(nnx.Rngs(0), whole=P() if kind == "Explicit" else None)
        shardings = nnx.get_named_sharding(nnx.state(model, nnx.Param), mesh)
        on_mesh = train_nnx(model, in_shards(tx, shardings))
    assert losses[-1] < losses[0]
    assert_close(on_mesh[:2], (losses, params))
    bases = cc.projecting_lens(on_mesh[2].opt_state).projectors
    up, layers = bases["up"]["kernel"][...], bases["layers"]["kernel"][...]
    assert up.sharding.shard_shape(up.shape) == (2, 3)  # of (8, 3): its inputs are on "data"
    assert layers.sharding.shard_shape(layers.shape) == (2, 8, 3)  # of (2, 16, 3), on "model"
    kernel = model.up.kernel[...]
    assert kernel.sharding.spec == P("data", "model")


@pytest.mark.parametrize("spelling", ["boxed", "unboxed", "of the arrays", "abstract"])
def test_shardings_of_nnx_parameters_in_every_spelling(spelling):
    mesh, tx = eight_devices("Auto"), gj.galore_adamw(1e-2, **LENS)
    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
        params = nnx.state(LogicalNetwork(nnx.Rngs(0)), nnx.Param)
        abstract = nnx.state(nnx.eval_shape(lambda: LogicalNetwork(nnx.Rngs(0))), nnx.Param)
        boxed = nnx.get_named_sharding(params, mesh)
    expected = gj.state_sharding(tx, params, boxed)
    given, shardings = {
        "boxed": (params, boxed),
        "unboxed": tuple(map(nnx.to_pure_dict, (params, boxed))),
        "of the arrays": (params, jax.tree.map(lambda array: array.sharding, params)),
        "abstract": (abstract, boxed),
    }[spelling]
    seen = gj.state_sharding(tx, given, shardings)
    assert jax.tree.structure(seen) == jax.tree.structure(jax.eval_shape(tx.init, given))
    for one, other, array in zip(
        *map(jax.tree.leaves, (seen, expected, jax.eval_shape(tx.init, given))), strict=True
    ):
        assert one.is_equivalent_to(other, array.ndim)


class LogicalLinen(nn.Module):
    whole: Any = None

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        up = nn.with_logical_partitioning(init, ("embed", "mlp"))
        down = nn.with_partitioning(init, ("model", "data"))
        dot = functools.partial(jax.lax.dot_general, out_sharding=self.whole)
        x = jnp.tanh(nn.Dense(16, kernel_init=up, dot_general=dot, name="up")(x))
        return nn.Dense(8, kernel_init=down, dot_general=dot, name="down")(x)


def train_linen(model, params, tx):
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        def loss_fn(params):
            return wide_loss(functools.partial(state.apply_fn, {"params": params}))

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return loss, state.apply_gradients(grads=grads)

    losses = []
    for _ in range(STEPS):
        loss, state = step(state)
        losses.append(float(loss))
    return losses, jax.device_get(nn.unbox(state.params)), state


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("boxed", [True, False])
@pytest.mark.sampled(1)
def test_linen_train_state_on_a_mesh_by_logical_axes(kind, boxed):
    model, tx = LogicalLinen(), gj.galore_adamw(1e-2, rank=3, update_proj_gap=2, weight_decay=1e-3)
    params = model.init(jax.random.key(0), WIDE)["params"]
    losses, expected, _ = train_linen(model, nn.unbox(params), tx)
    mesh = eight_devices(kind)
    # Rules for logical axes; a mesh axis is its own name.
    rules = (*RULES, ("data", "data"), ("model", "model"))
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(params), mesh, rules)
    params = jax.device_put(params if boxed else nn.unbox(params), shardings)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        model = LogicalLinen(whole=P() if kind == "Explicit" else None)
        on_mesh = train_linen(model, params, in_shards(tx, shardings))
    assert losses[-1] < losses[0]
    assert_close(on_mesh[:2], (losses, expected))
    state = on_mesh[2]
    basis = cc.projecting_lens(state.opt_state).projectors["down"]["kernel"]
    assert basis.sharding.shard_shape(basis.shape) == (2, 3)
    assert isinstance(state.params["up"]["kernel"], nn.LogicallyPartitioned) == boxed
    (kernel,) = jax.tree.leaves(state.params["up"]["kernel"])
    assert kernel.sharding.spec == P("data", "model")


@pytest.mark.parametrize(
    "tx", [optax.adamw(1e-3), gj.galore_sgd(1e-2, rank=3)], ids=["optax", "ours"]
)
def test_shardings_of_a_state_have_the_boxes_of_the_state(tx):
    params = LogicalLinen().init(jax.random.key(0), WIDE)["params"]
    mesh = eight_devices("Auto")
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(params), mesh, RULES)
    for given in (params, nn.unbox(params)):
        state = gj.state_sharding(tx, given, shardings)
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(given))


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
