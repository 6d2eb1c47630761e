"""GaLore in plain JAX: a transformer in three functions, trained in two ways.

Run it::

    python -m examples.tutorials.plain_jax
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_jax as gj
from examples.tutorials.text import VOCAB, batches

LAYERS, WIDTH, HEADS, HIDDEN, LENGTH = 2, 64, 4, 256, 64
STEPS = 80


def random_params(rng):
    """The layers are stacked: every array of a block begins with an axis of length LAYERS."""

    def normal(*shape, fan_in=WIDTH):
        return jnp.asarray(rng.normal(size=shape) / fan_in**0.5, jnp.float32)

    return {
        "embed": {"text": normal(VOCAB, WIDTH), "position": normal(LENGTH, WIDTH)},
        "blocks": {
            "qkv": normal(LAYERS, 3, WIDTH, HEADS, WIDTH // HEADS),
            "out": normal(LAYERS, WIDTH, WIDTH),
            "up": normal(LAYERS, WIDTH, HIDDEN),
            "down": normal(LAYERS, HIDDEN, WIDTH, fan_in=HIDDEN),
        },
        "lm_head": normal(WIDTH, VOCAB),
    }


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


# 1. The model. Weights are multiplied with `gj.matmul` and `gj.backward.einsum`: with arrays they
#    do what `@` and `jnp.einsum` do, and they know the other forms that a weight can take.
def embed(params, text):
    return params["embed"]["text"][text[:, :-1]] + params["embed"]["position"]


def block(layer, x):
    q, k, v = gj.backward.einsum("btd,cdhk->cbthk", norm(x), layer["qkv"])
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + gj.matmul(mixed.reshape(x.shape), layer["out"])
    hidden = jax.nn.gelu(gj.matmul(norm(x), layer["up"]))
    return x + gj.matmul(hidden, layer["down"])


def head(params, x, text):
    logits = norm(x) @ params["lm_head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


def loss_fn(params, text):
    def scanned(x, layer):
        return block(layer, x), None

    x, _ = jax.lax.scan(scanned, embed(params, text), params["blocks"])
    return head(params, x, text)


# 2. The optimizer. `axes` says which axes of a leaf form the matrix; those it does not name (the
#    layers; query, key and value) number the matrices. Embedding and head stay at full size.
tx = gj.galore_adamw(
    optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, 2 * STEPS),
    rank=16,
    update_proj_gap=25,
    scale=1.0,
    axes={"qkv": gj.MatrixAxes(2, (3, 4)), "blocks": gj.MatrixAxes(-2, -1)},
)


# 3. A step. `projected_value_and_grad` stands where `jax.value_and_grad` stood: it returns G·P in
#    the place of the gradients G of projected leaves, and never forms those.
@jax.jit
def step(params, state, text):
    loss, grads = gj.projected_value_and_grad(loss_fn, tx)(params, state, text)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


# 4. The same step layer by layer, from the same three functions: every block is updated as soon as
#    its gradient is there, so that there is never more than one block's.
layerwise = gj.layerwise.train_step(embed, block, head, tx)
layerwise = jax.jit(layerwise, donate_argnums=(0, 1))


def main():
    params = random_params(np.random.default_rng(0))
    state = tx.init(params)
    print(gj.describe(tx, params))

    for i, text in enumerate(batches(STEPS, length=LENGTH)):
        params, state, loss = step(params, state, text)
        if i % 25 == 0:
            print(f"step {i:4d}  loss {loss:.4f}")

    # Both kinds of step share one state, and can take turns.
    for i, text in enumerate(batches(STEPS, seed=1, length=LENGTH), start=STEPS):
        params, state, metrics = layerwise(params, state, text)
        if i % 25 == 0 or i == 2 * STEPS - 1:
            print(f"step {i:4d}  loss {metrics.loss:.4f}  layer by layer")


if __name__ == "__main__":
    main()
