"""GaLore with Flax NNX: `nnx.Optimizer`, and moments of one byte each.

Run it::

    python -m examples.tutorials.flax_nnx
"""

import jax.numpy as jnp
import optax
from flax import nnx

import galore_jax as gj
from examples.tutorials.text import VOCAB, batches

LAYERS, WIDTH, HEADS, HIDDEN, LENGTH = 2, 64, 4, 256, 64
STEPS = 150


# 1. A model like any other: nothing in it knows of GaLore.
class Block(nnx.Module):
    def __init__(self, rngs):
        self.attn_norm, self.mlp_norm = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, use_bias=False, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.attn_norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class LanguageModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.position_embed = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, text):
        x = self.embed(text) + self.position_embed(jnp.arange(text.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def loss_fn(model, text):
    logits = model(text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


# 2. The optimizer. Attention kernels are [width, heads, head_dim], and the output kernel the other
#    way round: `axes` groups two of their axes to one side of a matrix.
tx = gj.galore_adamw8bit(
    optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, STEPS),
    rank=16,
    update_proj_gap=50,
    scale=1.0,
    axes={
        "attn/(query|key|value)/kernel": gj.MatrixAxes(0, (1, 2)),
        "attn/out/kernel": gj.MatrixAxes((0, 1), 2),
    },
)


# 3. A step, as Flax documents it.
@nnx.jit
def step(model, optimizer, text):
    loss, grads = nnx.value_and_grad(loss_fn)(model, text)
    optimizer.update(model, grads)
    return loss


def main():
    model = LanguageModel(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    print(gj.describe(tx, params))
    print("AdamW:", gj.memory.estimate(optax.adamw(1e-3), params), sep="\n")
    print("8-bit GaLore:", gj.memory.estimate(tx, params), sep="\n")

    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for i, text in enumerate(batches(STEPS, length=LENGTH)):
        loss = step(model, optimizer, text)
        if i % 50 == 0 or i == STEPS - 1:
            print(f"step {i:4d}  loss {loss:.4f}")


if __name__ == "__main__":
    main()
