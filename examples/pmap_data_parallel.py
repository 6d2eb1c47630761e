"""Data parallelism with per-device gradients: only their projections travel between devices.

Eight simulated CPU devices by default; on a machine with several GPUs leave the flag out::

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m examples.pmap_data_parallel
"""

import functools

import jax
import jax.numpy as jnp
import optax

import galore_jax as gj

WIDTH, RANK, BATCH, STEPS = 256, 16, 64, 200


def init(key):
    up, down = jax.random.split(key)
    return {
        "up": jax.random.normal(up, (WIDTH, 4 * WIDTH)) / WIDTH**0.5,
        "down": jax.random.normal(down, (4 * WIDTH, WIDTH)) / (4 * WIDTH) ** 0.5,
    }


def predict(params, x):
    return gj.matmul(jnp.tanh(gj.matmul(x, params["up"])), params["down"])


def loss_fn(params, x, y):
    return jnp.mean((predict(params, x) - y) ** 2)


def batches(teacher):
    for step in range(STEPS):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (BATCH, WIDTH))
        yield x, predict(teacher, x)


def train_step(tx, params, state, x, y):
    """One update; with an `axis_name` in `tx`, of the share that this device has of the batch."""
    loss, grads = gj.projected_value_and_grad(loss_fn, tx)(params, state, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def train(devices):
    """The losses of a run whose batches are shared out between `devices`."""
    axis_name = "data" if devices > 1 else None
    tx = gj.galore_adamw(2e-3, rank=RANK, scale=1.0, update_proj_gap=50, axis_name=axis_name)
    step = functools.partial(train_step, tx)
    params = init(jax.random.key(0))
    state, losses = tx.init(params), []
    if devices > 1:
        params, state = jax.tree.map(lambda x: jnp.stack([x] * devices), (params, state))
        step = jax.pmap(step, axis_name=axis_name, donate_argnums=(0, 1))
    else:
        step = jax.jit(step, donate_argnums=(0, 1))
    for x, y in batches(init(jax.random.key(2))):
        if devices > 1:
            x, y = (a.reshape(devices, -1, WIDTH) for a in (x, y))
        params, state, loss = step(params, state, x, y)
        losses.append(float(jnp.mean(loss)))
    return losses


if __name__ == "__main__":
    for devices in (1, jax.device_count()):
        losses = train(devices)
        print(f"{devices} device(s): loss {losses[0]:.4f} -> {losses[-1]:.4f}")
