"""Small models with every kind of product, and training them with and without their gradients."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

import galore_jax as gj
from galore_jax.transforms.state import low_rank_states

WIDTH, HIDDEN, LAYERS, EXPERTS, VOCABULARY = 12, 20, 2, 3, 11
RANK = 4
STEPS, GAP = 20, 7

SHAPES = {
    "embed": (VOCABULARY, WIDTH),
    "blocks": {
        "up": (LAYERS, WIDTH, HIDDEN),
        "down": (LAYERS, HIDDEN, WIDTH),
        "norm": (LAYERS, WIDTH),
    },
    "square": (WIDTH, WIDTH),
}
ALL_SHAPES = SHAPES | {
    "heads": (WIDTH, 3, 4),
    "merge": (3, 4, WIDTH),
    "inner": (EXPERTS, WIDTH, 14),
    "outer": (EXPERTS, 14, WIDTH),
}
TWO_SHAPES = {"embed": (VOCABULARY, WIDTH), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
AXES = {
    "heads": gj.MatrixAxes(0, (1, 2)),
    "merge": gj.MatrixAxes((0, 1), 2),
    "blocks/(up|down)|inner|outer": gj.MatrixAxes(-2, -1),
}
OPTIONS = {"rank": RANK, "axes": AXES, "update_proj_gap": GAP}


def normal(shape, seed=0, dtype=jnp.float32):
    """Columns of decreasing size: every basis is determined by its gradient."""
    rng = np.random.default_rng(seed)
    scale = np.linspace(1, 0.3, shape[-1]) / np.sqrt(shape[-2] if len(shape) > 1 else 1)
    return jnp.asarray(rng.normal(size=shape) * scale, dtype)


def draw(shapes, seed=0, dtype=jnp.float32):
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda node: isinstance(node, tuple))
    return treedef.unflatten(normal(s, 100 * seed + i, dtype) for i, s in enumerate(leaves))


def data(steps=STEPS, seed=0, dtype=jnp.float32):
    """Tokens and targets for a number of steps, learnable ones."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(VOCABULARY, size=(steps, 2, 8))
    table = rng.normal(size=(VOCABULARY, WIDTH))
    return jnp.asarray(tokens), jnp.asarray(table[tokens], dtype)


def block(h, layer):
    hidden = jnp.tanh(gj.matmul(h * layer["norm"], layer["up"]))
    return h + gj.matmul(hidden, layer["down"])


def scanned(h, blocks):
    return jax.lax.scan(lambda h, layer: (block(h, layer), None), h, blocks)[0]


def rematted(h, blocks, policy=None):
    body = jax.checkpoint(lambda h, layer: (block(h, layer), None), policy=policy)
    return jax.lax.scan(body, h, blocks)[0]


def unrolled(h, blocks):
    for number in range(LAYERS):
        h = block(h, jax.tree.map(operator.itemgetter(number), blocks))
    return h


def squared(prediction, target, dtype=jnp.float32):
    error = prediction.astype(dtype) - target.astype(dtype)
    return jnp.mean(error * error)


def loss(params, tokens, target, blocks=scanned):
    h = blocks(params["embed"][tokens], params["blocks"])
    return squared(gj.matmul(h, params["square"]), target)


def loss_of_two(params, tokens, target):
    """Quick to compile."""
    hidden = jnp.tanh(gj.matmul(params["embed"][tokens], params["up"]))
    return squared(gj.matmul(hidden, params["down"]), target)


def loss_of_all(params, tokens, target, dtype=jnp.float32):
    """Heads, experts that share activations, experts that do not, and ``@``."""
    h = scanned(params["embed"][tokens], params["blocks"])
    heads = gj.backward.einsum("...d,dhk->...hk", h, params["heads"])
    h = h + gj.backward.einsum("bthk,hkd->btd", jnp.tanh(heads), params["merge"])
    inner = jnp.tanh(gj.backward.einsum("btd,edf->ebtf", h, params["inner"]))
    h = h + gj.backward.einsum("ebtf,efd->ebtd", inner, params["outer"]).mean(0)
    return squared(h @ params["square"], target, dtype)


def full(loss, tx):
    """A step with the gradient; weights in codes have one too."""

    def step(params, state, *batch):
        value, gradient = gj.quant.value_and_grad(loss)(params, *batch)
        return value, *tx.update(gradient, state, params)

    return step


def projected(loss, tx):
    """A step without."""

    def step(params, state, *batch):
        value, gradient = gj.projected_value_and_grad(loss, tx)(params, state, *batch)
        return value, *tx.update(gradient, state, params)

    return step


@functools.partial(jax.jit, static_argnums=0)
def _run(step, params, state, batches):
    def body(carry, batch):
        key, batch = batch
        value, updates, state = step(*carry, *batch)
        params = gj.apply_updates(carry[0], updates, key=key)
        return (params, state), (value, gj.quant.dequantize_params(params))

    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(batches)[0]))
    (_, state), (losses, way) = jax.lax.scan(body, (params, state), (keys, batches))
    return losses, way, state


def train(step, tx, params, batches):
    """Losses and parameters after every step, and the last state."""
    return _run(step, params, tx.init(params), batches)


def distance(one, other):
    """The largest relative Frobenius distance of two leaves."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(
        float(np.linalg.norm(np.float64(a) - np.float64(b)) / np.linalg.norm(np.float64(b)))
        for a, b in pairs
    )


def compare(tx, loss, params, batches, reference=None):
    """Distances of losses and ways between both backward passes, and both last states.

    Nothing is compared unless training went somewhere and bases moved.
    """
    losses, way, state = train(projected(loss, tx), tx, params, batches)
    plain = full(reference or loss, tx)
    expected_losses, expected_way, expected = train(plain, tx, params, batches)
    start = gj.quant.dequantize_params(params)
    last = jax.tree.map(lambda path: path[-1], expected_way)
    moved = [jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in zip(
        jax.tree.leaves(last), jax.tree.leaves(start), strict=True)]  # fmt: skip
    assert min(moved) > 0.01
    np.testing.assert_array_equal(refreshes(state), refreshes(expected))
    assert max(refreshes(expected)) >= 2
    return distance(losses, expected_losses), distance(way, expected_way), state, expected


def refreshes(state):
    """How often each basis of all lenses was recomputed."""
    counts = []
    for lens in low_rank_states(state):
        counts += [np.ravel(numbers) for numbers in lens.refresh_state.refreshes.values()]
    return np.concatenate(counts)
