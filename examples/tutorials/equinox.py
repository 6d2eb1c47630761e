"""GaLore with Equinox: modules are trees, and micro-batches are summed up after their projection.

Run it::

    python -m examples.tutorials.equinox
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import galore_jax as gj
from examples.tutorials.text import VOCAB, batches

LAYERS, WIDTH, HEADS, HIDDEN, LENGTH = 2, 64, 4, 256, 64
STEPS, MICRO_BATCHES = 125, 2


# 1. A model like any other: nothing in it knows of GaLore.
class Block(eqx.Module):
    attn_norm: eqx.nn.RMSNorm
    attn: eqx.nn.MultiheadAttention
    mlp_norm: eqx.nn.RMSNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        attn, up, down = jax.random.split(key, 3)
        self.attn_norm, self.mlp_norm = eqx.nn.RMSNorm(WIDTH), eqx.nn.RMSNorm(WIDTH)
        self.attn = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=attn)
        self.up = eqx.nn.Linear(WIDTH, HIDDEN, key=up)
        self.down = eqx.nn.Linear(HIDDEN, WIDTH, key=down)

    def __call__(self, x):
        y, causal = jax.vmap(self.attn_norm)(x), jnp.tri(len(x), dtype=bool)
        x = x + self.attn(y, y, y, mask=causal)
        return x + jax.vmap(lambda y: self.down(jax.nn.gelu(self.up(self.mlp_norm(y)))))(x)


class LanguageModel(eqx.Module):
    embed: eqx.nn.Embedding
    position_embed: jax.Array
    blocks: list[Block]
    norm: eqx.nn.RMSNorm
    lm_head: eqx.nn.Linear

    def __init__(self, key):
        embed, position, head, *blocks = jax.random.split(key, 3 + LAYERS)
        self.embed = eqx.nn.Embedding(VOCAB, WIDTH, key=embed)
        self.position_embed = jax.random.normal(position, (LENGTH, WIDTH))
        self.blocks = [Block(block) for block in blocks]
        self.norm = eqx.nn.RMSNorm(WIDTH)
        self.lm_head = eqx.nn.Linear(WIDTH, VOCAB, key=head)

    def __call__(self, text):
        x = jax.vmap(self.embed)(text) + self.position_embed
        for block in self.blocks:
            x = block(x)
        return jax.vmap(lambda y: self.lm_head(self.norm(y)))(x)


def loss_fn(model, text):
    logits = jax.vmap(model)(text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


# 2. The optimizer. Equinox keeps the weight of a linear layer as [out, in], which `axes` says.
#    `accumulate` runs it once for every two micro-batches; what it keeps between them is as small
#    as the projections. Schedule and refreshes count windows.
tx = gj.accumulate(
    gj.galore_adamw(
        optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, STEPS),
        rank=16,
        update_proj_gap=50,
        scale=1.0,
        axes=gj.MatrixAxes(reduction_axis=-1, output_axis=-2),
    ),
    every=MICRO_BATCHES,
)


# 3. A step, as Equinox documents it: the optimizer sees the arrays of the module.
@eqx.filter_jit
def step(model, state, text):
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, text)
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, loss


def main():
    model = LanguageModel(jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    print(gj.describe(tx, params))
    state = tx.init(params)

    for i, text in enumerate(batches(STEPS * MICRO_BATCHES, rows=8, length=LENGTH)):
        model, state, loss = step(model, state, text)
        if i % 50 == 0 or i == STEPS * MICRO_BATCHES - 1:
            print(f"micro-batch {i:4d}  loss {loss:.4f}")


if __name__ == "__main__":
    main()
