"""GaLore with Flax Linen: `TrainState`, a scheduled rate, and a run that is stopped and goes on.

Run it::

    python -m examples.tutorials.flax_linen
"""

import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

import galore_jax as gj
from examples.tutorials.text import VOCAB, batches

CONTEXT, WIDTH, HIDDEN = 16, 64, 256
STEPS = 200


# 1. A model like any other: the next character from the sixteen before it.
class LanguageModel(nn.Module):
    @nn.compact
    def __call__(self, text):
        x = nn.Embed(VOCAB, WIDTH, name="embed")(text)
        x = x.reshape(*x.shape[:-2], -1)
        for width in (HIDDEN, HIDDEN):
            x = nn.LayerNorm()(nn.relu(nn.Dense(width)(x)))
        return nn.Dense(VOCAB, name="lm_head")(x)


model = LanguageModel()


# 2. The optimizer. A rank that is a fraction adapts to each matrix, `staggered` spreads the
#    refreshes over the gap, and `rotate` takes Adam's moments along when a basis moves.
tx = gj.galore_adamw(
    optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, STEPS),
    rank=1 / 8,
    update_proj_gap=gj.refresh.staggered(50),
    transport=gj.transport.rotate(),
    scale=1.0,
    weight_decay=0.01,
)


# 3. A step, as Flax documents it.
@jax.jit
def step(state, text):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, text[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, -1]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def new_state():
    params = model.init(jax.random.key(0), np.zeros((1, CONTEXT), int))["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def train(state, texts):
    """The state after the texts; the step count of the state says where in the run it is."""
    for text in texts:
        number = int(state.step)
        state, loss = step(state, text)
        if number % 50 == 0 or number == STEPS - 1:
            print(f"step {number:4d}  loss {loss:.4f}")
    return state


def main():
    texts = list(batches(STEPS, rows=256, length=CONTEXT))
    state = new_state()
    print(gj.describe(tx, state.params))

    # 4. Half of the run, a checkpoint, and the other half.
    state = train(state, texts[: STEPS // 2])
    with tempfile.TemporaryDirectory() as directory, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(directory) / "half", state)
        checkpointer.wait_until_finished()
        finished = train(state, texts[STEPS // 2 :])

        # 5. Another process would begin here: bases, moments and refresh decisions come back with
        #    the rest of the state. The options in `tx` do not: write them down with your config.
        print("again from the checkpoint")
        restored = checkpointer.restore(Path(directory) / "half", jax.eval_shape(new_state))
    resumed = train(restored, texts[STEPS // 2 :])

    same = jax.tree.map(np.array_equal, finished, resumed)
    print("bit for bit the same:", all(jax.tree.leaves(same)))


if __name__ == "__main__":
    main()
