"""Windows of micro-batches that the tests of accumulation share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_jax as gj
from galore_jax.transforms.state import low_rank_states

EVERY, WINDOWS, GAP = 8, 4, 2
SHAPES = {"heads": (6, 2, 4), "norm": (6,), "stack": (3, 6, 8), "tall": (10, 6)}
PARAMS = {name: jnp.full(shape, 0.1, jnp.float32) for name, shape in SHAPES.items()}
WIDE = {"w": jnp.ones((24, 40))}  # no other array of its step has as many entries
AXES = {"heads": gj.MatrixAxes(0, (1, 2)), "stack": gj.MatrixAxes()}
OPTIONS = {"rank": 3, "axes": AXES, "update_proj_gap": GAP}
LENS = {"rank": 3, "axes": AXES}
RATE = optax.linear_schedule(1e-2, 1e-3, 5)
MOMENTS8 = gj.quantized_state(optax.scale_by_adam(), min_size=2, block=8)


def sgd(learning_rate=1e-2, **options):
    return gj.galore_sgd(learning_rate, **(OPTIONS | options))


def adamw(**options):
    return gj.galore_adamw(RATE, **(OPTIONS | options))


def lens8(**options):
    lens = gj.low_rank_projection(MOMENTS8, **LENS, **({"refresh": GAP} | options))
    return optax.chain(lens, optax.scale_by_learning_rate(1e-2))


KINDS = {
    "sgd": sgd,
    "adamw": functools.partial(adamw, weight_decay=0.1),
    "rotate, short": functools.partial(adamw, transport=gj.transport.rotate()),
    "rotate, long": functools.partial(adamw, transport=gj.transport.rotate(), side="long"),
    "staggered": functools.partial(sgd, update_proj_gap=gj.refresh.staggered(3)),
    "adafactor": lambda: gj.galore_adafactor(RATE, **OPTIONS),
    "8 bits": lens8,
    "q-galore": lambda: lens8(
        codec=gj.codecs.int4(block=8), refresh=gj.refresh.adaptive(1, patience=1, threshold=1e-3)
    ),
    "partition": lambda: optax.partition(
        {"a": adamw(), "b": sgd(rank=2), "c": optax.adam(1e-2)},
        {"heads": "a", "norm": "c", "stack": "b", "tall": "a"},
    ),
    "masked": lambda: optax.masked(sgd(), {name: name != "tall" for name in PARAMS}),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1e3), adamw()),
}
# A code of 8 bits may tip where a sum is taken in another order.
TOLERANCE = {"8 bits": 2e-2, "q-galore": 2e-2}


class Compiled:
    """A transformation whose functions are compiled."""

    def __init__(self, tx):
        self.traces = 0
        self.start = jax.jit(tx.init)(PARAMS)
        self.update = jax.jit(functools.partial(self._update, tx))

    def _update(self, tx, gradients, state, params):
        self.traces += 1
        return tx.update(gradients, state, params)

    def run(self, gradients, state=None):
        """The last update and the state after it."""
        state = self.start if state is None else state
        for gradient in gradients:
            updates, state = self.update(gradient, state, PARAMS)
        return updates, state


@functools.cache
def compiled(name):
    """A kind, and its accumulation."""
    tx = KINDS[name]()
    return Compiled(tx), Compiled(gj.accumulate(tx, EVERY))


def draw(seed, dtype=jnp.float32):
    """A gradient: of a signal that all share, and noise of its own."""
    signal, noise = np.random.default_rng(99), np.random.default_rng(seed)
    return {
        name: jnp.asarray(signal.normal(size=shape) + 0.5 * noise.normal(size=shape), dtype)
        for name, shape in SHAPES.items()
    }


def mean(gradients):
    return jax.tree.map(lambda *gs: np.mean([np.asarray(g, np.float64) for g in gs], 0), *gradients)


def big_batch(gradients):
    return jax.tree.map(lambda g, p: jnp.asarray(g, p.dtype), mean(gradients), gradients[0])


def window(number, every=EVERY, equal=False):
    return [draw(1000 * number + (0 if equal else i)) for i in range(every)]


def signature(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype, jax.typeof(x).weak_type) for x in leaves]


def due(state):
    return any(
        np.any(x) for lens in low_rank_states(state) for x in leaves_of(lens.refresh_state.due)
    )


def leaves_of(tree):
    return jax.tree.leaves(tree)


def assert_close(ours, theirs, tolerance):
    """Leaf by leaf, relative to the norm of the leaf."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(ours)]
    for path, a, b in zip(paths, leaves_of(ours), leaves_of(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), path


def assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(leaves_of(ours), leaves_of(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
