"""A residual network of stacked blocks, its ordinary training step, and how to compare runs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_jax as gj
from galore_jax import collectives
from galore_jax.quant.differentiate import probes_of, with_probes
from galore_jax.transforms.lenses import low_rank_states

LAYERS, WIDTH, HIDDEN, VOCAB = 4, 16, 48, 24
KERNELS = ("blocks/down/kernel", "blocks/up/kernel")


def initial(dtype: Any = jnp.float32) -> dict[str, Any]:
    """Two stacked matrices and a stacked norm, an embedding, a norm, a head."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), dtype)

    return {
        "embed": {"embedding": 4 * draw(VOCAB, WIDTH)},
        "blocks": {
            "norm": {"scale": jnp.ones((LAYERS, WIDTH), dtype)},
            "up": {"kernel": draw(LAYERS, WIDTH, HIDDEN)},
            "down": {"kernel": draw(LAYERS, HIDDEN, WIDTH)},
        },
        "norm": {"scale": jnp.ones(WIDTH, dtype)},
        "lm_head": {"kernel": draw(WIDTH, VOCAB)},
    }


def _normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    mean = jnp.mean(x * x, axis=-1, keepdims=True) + jnp.asarray(1e-6, x.dtype)
    return x * jax.lax.rsqrt(mean) * scale


def embed(params: Any, tokens: jax.Array) -> jax.Array:
    return params["embed"]["embedding"][tokens[:, :-1]]


def block(layer: Any, x: jax.Array) -> jax.Array:
    hidden = gj.matmul(_normed(x, layer["norm"]["scale"]), layer["up"]["kernel"])
    return x + gj.matmul(jax.nn.relu(hidden), layer["down"]["kernel"])


def head(params: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
    logits = gj.matmul(_normed(x, params["norm"]["scale"]), params["lm_head"]["kernel"])
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(wide, tokens[:, 1:]))


MODEL = (embed, block, head)


def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
    x, _ = jax.lax.scan(
        lambda x, layer: (block(layer, x), None), embed(params, tokens), params["blocks"]
    )
    return head(params, x, tokens)


def batches(count: int) -> list[jax.Array]:
    rng = np.random.default_rng(1)
    after = rng.permutation(VOCAB)
    rows = rng.integers(VOCAB, size=(count, 4, 1))
    for _ in range(16):
        rows = np.concatenate([rows, after[rows[..., -1:]]], axis=-1)
    return list(jnp.asarray(rows, jnp.int32))


def ordinary_step(tx: optax.GradientTransformation, loss: Any = loss_fn) -> Any:
    """The gradient of everything, then the update of everything."""

    def step(params: Any, opt_state: Any, batch: Any, key: jax.Array | None = None):
        value, gradients = gj.quant.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return gj.apply_updates(params, updates, key=key), opt_state, value

    return step


def plain(fn: Any, params: Any, opt_state: Any, *inputs: Any, layer: Any = 0) -> Any:
    """A pullback that forms every gradient, as a user's own may; local to each device."""
    del layer
    axes = {
        n for lens in low_rank_states(opt_state) for n in collectives.names(lens.config.axis_name)
    }
    probes = jax.tree.map(lambda x: collectives.varying(x, tuple(sorted(axes))), probes_of(params))
    return jax.vjp(lambda probes, *x: fn(with_probes(params, probes), *x), probes, *inputs)


# Options of `train_step`.
PULLBACKS = {"full": {"pullback": plain}, "projected": {}}


def run(step: Any, params: Any, opt_state: Any, data: list[Any], key: jax.Array | None = None):
    """Parameters and state after the steps, and the loss of each."""
    step, losses = jax.jit(step), []
    for number, batch in enumerate(data):
        rounding = None if key is None else jax.random.fold_in(key, number)
        params, opt_state, result = step(params, opt_state, batch, rounding)
        losses.append(float(getattr(result, "loss", result)))
    return params, opt_state, losses


def by_path(tree: Any) -> dict[str, np.ndarray]:
    """Every array by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): np.asarray(leaf) for path, leaf in leaves}


def distance(one: Any, other: Any) -> float:
    """The greatest relative Frobenius distance of two leaves."""
    ours, theirs = by_path(one), by_path(other)
    assert ours.keys() == theirs.keys() and ours
    return max(float(np.linalg.norm(ours[k] - theirs[k]) / np.linalg.norm(theirs[k])) for k in ours)


def signature(tree: Any) -> Any:
    """Structure, shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]
