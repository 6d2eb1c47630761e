"""A few steps on gradients that wander, and the bases that they leave in the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_jax as gj

# Matrices projected on either side, a stack, and axes that are grouped.
SHAPES = {"tall": (9, 6), "stack": (3, 6, 8), "heads": (6, 2, 4), "bias": (6,)}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
AXES = {"heads": gj.MatrixAxes(0, (1, 2)), "stack": gj.MatrixAxes(-2, -1)}
PROJECTED = ("heads", "stack", "tall")
RANK = 2


def lens(inner=None, **options):
    return gj.low_rank_projection(inner or optax.trace(0.9), RANK, axes=AXES, **options)


def wandering(steps, params=PARAMS, seed=0):
    """Gradients with as much in common as not."""
    rng = np.random.default_rng(seed)

    def normal():
        return {name: rng.normal(size=p.shape) for name, p in params.items()}

    base = normal()
    for _ in range(steps):
        noise = normal()
        yield {name: jnp.asarray(base[name] + noise[name], jnp.float32) for name in base}


def states(tx, gradients, params=PARAMS):
    """The state before the first step and after each."""
    update = jax.jit(tx.update)
    found = [tx.init(params)]
    for gradient in gradients:
        found.append(update(gradient, found[-1], params)[1])
    return found


_decoded = jax.jit(lambda stored: gj.quant.dequantize(stored).astype(jnp.float32))


def bases(state, name):
    """float64 ``[matrices, projected, rank]`` of a leaf, decoded."""
    decoded = np.asarray(_decoded(state.projectors[name]), np.float64)
    return decoded.reshape(-1, *decoded.shape[-2:])


def matrices(name, gradient):
    """float64 ``[matrices, kept, projected]`` of a gradient whose shorter side is projected."""
    gradient = np.asarray(gradient, np.float64)
    if name == "tall":
        return gradient[None]
    if name == "heads":
        return gradient.reshape(1, 6, 8).swapaxes(-2, -1)
    return gradient.swapaxes(-2, -1)
