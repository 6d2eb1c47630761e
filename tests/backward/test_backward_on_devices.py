"""Projected backward passes on many devices go where that on one device goes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_models import SHAPES, distance, draw, loss, refreshes

import galore_jax as gj

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction

STEPS, WIDTH = 5, 16
SHAPES = SHAPES | {
    "embed": (11, WIDTH),
    "blocks": {"up": (2, WIDTH, 24), "down": (2, 24, WIDTH), "norm": (2, WIDTH)},
    "square": (WIDTH, WIDTH),
}
OPTIONS = {
    "rank": 4,
    "axes": gj.MatrixAxes(-2, -1),
    "targets": "up|down|square",
    "update_proj_gap": 3,
}
make = functools.partial(gj.galore_adamw, 3e-2, **OPTIONS)


def batch(seed):
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(11, size=(16, 4)))
    return tokens, jnp.asarray(rng.normal(size=(16, 4, WIDTH)), jnp.float32)


def mesh_of(sizes=(8,), names=("data",), kind=AxisType.Auto):
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))


def step_of(tx, mean=None, reduced=lambda value: value):
    """`mean` is that of the loss, where its gradient is not local."""
    local = loss if mean is None else lambda *args: mean(loss(*args))

    def step(params, state, *batch):
        value, gradient = gj.projected_value_and_grad(local, tx)(params, state, *batch)
        updates, state = tx.update(gradient, state, params)
        return reduced(value), optax.apply_updates(params, updates), state

    return step


def pmean(axes):
    return lambda value: jax.lax.pmean(value, axes)


def mapped(step, axes, mesh, **options):
    rows = P(axes)
    return jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(P(), P(), rows, rows), out_specs=P(), **options
        )
    )  # fmt: skip


def of_loss_per_device(**options):
    tx = make(axis_name="data")
    return mapped(step_of(tx, reduced=pmean("data")), "data", mesh_of(), **options)


def of_mean_loss():
    return mapped(step_of(make(), mean=pmean("data")), "data", mesh_of())


def of_two_axes():
    """One is of the lens; over the other the loss is a mean already."""
    tx = make(axis_name="data")
    step = step_of(tx, mean=pmean("rows"), reduced=pmean("data"))
    return mapped(step, ("data", "rows"), mesh_of((4, 2), ("data", "rows")))


def of_pmap():
    step = jax.pmap(
        step_of(make(axis_name="data"), reduced=pmean("data")),
        axis_name="data",
        in_axes=(None, None, 0, 0),
    )

    def run(params, state, *batch):
        spread = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
        out = step(params, state, *spread)
        for x in jax.tree.leaves(out):
            np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
        return jax.tree.map(lambda x: x[0], out)

    return run


def of_jit(specs):
    mesh, tx = mesh_of((4, 2), ("data", "model")), make()
    sharding = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    states = gj.state_sharding(tx, draw(SHAPES), sharding)
    rows = NamedSharding(mesh, P("data"))
    return jax.jit(
        step_of(tx),
        in_shardings=(sharding, states, rows, rows),
        out_shardings=(None, sharding, states),
    )


def specs_of(rows, columns):
    return {
        "embed": P(None, columns),
        "blocks": {"up": P(None, rows, columns), "down": P(None, columns, rows), "norm": P()},
        "square": P(rows, columns),
    }


WAYS = {
    "shard_map": of_loss_per_device,
    "shard_map, unchecked": lambda: of_loss_per_device(check_vma=False),
    "shard_map, mean loss": of_mean_loss,
    "shard_map, two axes": of_two_axes,
    "pmap": of_pmap,
    "fsdp": lambda: of_jit(specs_of("data", None)),
    "tensor": lambda: of_jit(specs_of(None, "model")),
    "both": lambda: of_jit(specs_of("data", "model")),
}


@functools.cache
def expected():
    tx = make()

    def step(params, state, *batch):
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(gradient, state, params)
        return value, optax.apply_updates(params, updates), state

    return follow(jax.jit(step))


def follow(step):
    params, values = draw(SHAPES), []
    state = make().init(params)
    for seed in range(STEPS):
        value, params, state = jax.device_get(step(params, state, *batch(seed)))
        values.append(value)
    return np.stack(values), params, state


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.sampled(2)
def test_equals_the_gradient_on_one_device(name):
    values, params, state = follow(WAYS[name]())
    expected_values, expected_params, expected_state = expected()
    np.testing.assert_allclose(values, expected_values, rtol=1e-5)
    assert distance(params, expected_params) < 1e-5
    np.testing.assert_array_equal(refreshes(state), refreshes(expected_state))
    assert refreshes(state).min() == 2 and distance(params, draw(SHAPES)) > 0.05


def test_gradients_on_an_explicit_mesh():
    """Inside of the products the compiler chooses; what comes out is sharded like what went in."""
    tx, params = make(), draw(SHAPES)
    mesh = mesh_of(kind=AxisType.Explicit)

    def product_loss(params, x, target):
        return jnp.mean((jnp.tanh(x @ params["square"]) - target) ** 2)

    params = {"square": params["square"]}
    x, target = jax.tree.map(lambda b: b[:, 0], (batch(0)[1], batch(1)[1]))
    state = tx.init(params)
    value_and_grad = gj.projected_value_and_grad(product_loss, tx)
    value, gradient = jax.jit(value_and_grad)(params, state, x, target)
    with jax.set_mesh(mesh):
        everywhere = jax.device_put((params, state), NamedSharding(mesh, P()))
        rows = jax.device_put((x, target), NamedSharding(mesh, P("data")))
        ours, found = jax.jit(value_and_grad)(*everywhere, *rows)
        decoded = gj.projected_value_and_grad(
            lambda p, *rows: product_loss({"square": p["square"].astype(jnp.float32)}, *rows), tx
        )
        _, formed = jax.jit(decoded)(*everywhere, *rows)
    np.testing.assert_allclose(ours, value, rtol=1e-6)
    for one in (found, formed):
        assert one["square"].moved
        lifted = [g["square"].value @ g["square"].basis.T for g in jax.device_get((one, gradient))]
        assert distance(*lifted) < 1e-5
