"""The seven matrices of one Llama block, at the sizes of the GaLore paper."""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class BlockSize:
    """Width and feed-forward width of a block, layers of the model, and the paper's rank."""

    width: int
    feed_forward: int
    layers: int
    rank: int

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Kernels as (in, out)."""
        d, f = self.width, self.feed_forward
        square = dict.fromkeys("qkvo", (d, d))
        return square | {"gate": (d, f), "up": (d, f), "down": (f, d)}


SIZES = {
    "60M": BlockSize(512, 1376, 8, 128),
    "130M": BlockSize(768, 2048, 12, 256),
    "350M": BlockSize(1024, 2736, 24, 256),
    "1B": BlockSize(2048, 5461, 24, 512),
}
# What a trial of a benchmark runs on, to see that it runs.
TRIAL_SIZES = SIZES | {"tiny": BlockSize(64, 172, 2, 16)}


def random_block(size: BlockSize, seed: int) -> dict:
    """Gaussian matrices in the shapes of a block."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(shape, np.float32) * 1e-2)
        for name, shape in size.shapes.items()
    }
