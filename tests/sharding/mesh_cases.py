"""Meshes of eight devices, and leaves sharded over them in every way that is in use."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_jax as gj

SHAPES = {"tall": (96, 32), "wide": (32, 96), "square": (48, 48), "stack": (4, 32, 64)}
MESHES = {
    "8x1": ((8, 1), ("data", "model")),
    "4x2": ((4, 2), ("data", "model")),
    "2x2x2": ((2, 2, 2), ("slice", "data", "model")),
}


def matrix_specs(rows, columns, layers=None):
    """The longer axis over `rows`, the other one over `columns`, a stack over `layers`."""
    return {
        "tall": P(rows, columns),
        "wide": P(columns, rows),
        "square": P(rows, columns),
        "stack": P(layers, columns, rows),
    }


# The same four names on every mesh: paths, and with them random numbers, are the same.
SPECS = {
    "8x1": {
        "fsdp": matrix_specs("data", None),
        "tensor": matrix_specs(None, "data"),
        "both": matrix_specs("data", "model"),
        "other": matrix_specs(None, None),
    },
    "4x2": {
        "fsdp": matrix_specs("data", None),
        "tensor": matrix_specs(None, "model"),
        "both": matrix_specs("data", "model"),
        "other": matrix_specs(("data", "model"), None),
    },
    "2x2x2": {
        "fsdp": matrix_specs(("slice", "data"), None),
        "tensor": matrix_specs(None, "model"),
        "both": matrix_specs(("slice", "data"), "model"),
        "other": matrix_specs("data", "model", "slice"),
    },
}


def mesh_of(name, kind=AxisType.Auto):
    shape, names = MESHES[name]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def on_mesh(mesh, specs):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def draw(seed, shapes):
    """A decaying spectrum, so that every basis is determined by its gradient."""
    rng = np.random.default_rng(seed)

    def normal(shape):
        return jnp.asarray(rng.normal(size=shape) * np.linspace(1, 0.1, shape[-1]), jnp.float32)

    return jax.tree.map(normal, shapes, is_leaf=lambda node: isinstance(node, tuple))


def train(tx, shapes, sharding=None, *, steps, spread=False):
    """Steps down gradients that depend on where they have led; parameters' way, and the state."""
    params, options = draw(0, shapes), {}
    if sharding is None:
        state = tx.init(params)
    else:
        params = jax.device_put(params, sharding)
        states = gj.state_sharding(tx, params, sharding, spread=spread)
        state = gj.init_sharded(tx, params, sharding, spread=spread)
        options = {"out_shardings": (sharding, states)}

    def step(params, state, noise):
        gradients = jax.tree.map(lambda p, n: n + 0.1 * p, params, noise)
        updates, state = tx.update(gradients, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    start, step = jax.device_get(params), jax.jit(step, **options)
    for number in range(steps):
        noise = draw(number + 1, shapes)
        params, state = step(params, state, jax.device_put(noise, sharding) if sharding else noise)
    way = jax.tree.map(lambda end, begin: np.asarray(end) - begin, jax.device_get(params), start)
    return way, state


def distance(one, other):
    """The largest relative Frobenius distance of two leaves, and which."""
    distances = {
        jax.tree_util.keystr(path): np.linalg.norm(a - b) / np.linalg.norm(b)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
        )
    }
    return max((distance, path) for path, distance in distances.items())
