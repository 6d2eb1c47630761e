"""GaLore in a plain JAX training loop: a two-layer network learns another one."""

import jax
import jax.numpy as jnp
import optax

import galore_jax as gj


def model(params, x):
    return jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"]


def random_params(key):
    up, down = jax.random.split(key)
    return {
        "up": jax.random.normal(up, (64, 256)) / 8,
        "bias": jnp.zeros(256),
        "down": jax.random.normal(down, (256, 64)) / 16,
    }


teacher, params = random_params(jax.random.key(0)), random_params(jax.random.key(1))
tx = gj.galore_adamw(optax.cosine_decay_schedule(3e-2, 1000), rank=16, update_proj_gap=50)
state = tx.init(params)
print(gj.describe(tx, params))


@jax.jit
def step(params, state, key):
    x = jax.random.normal(key, (128, 64))
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((model(p, x) - model(teacher, x)) ** 2))(
        params
    )
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


for i, key in enumerate(jax.random.split(jax.random.key(2), 1001)):
    params, state, loss = step(params, state, key)
    if i % 200 == 0:
        print(f"step {i:4d}  loss {loss:.4f}")
