"""How much of the best rank-r energy each projector captures, cold and warm.

    python -m benchmarks.captured_energy [--shape 512 1376] [--rank 128]

Spectra: power s_i = 1/i; exp s_i = exp(-4i/r) + 1e-4; flat = Gaussian noise. Warm: the previous
basis is exact for an older gradient, of which 90 % remain (G = 0.9 G_old + 0.1 of another draw).
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import galore_jax as gj
from benchmarks import report
from galore_jax.projectors import Projector, dense_operator
from galore_jax.views.matrix_view import matrix_view


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs=2, type=int, default=(512, 1376))
    parser.add_argument("--rank", type=int, default=128)
    options = parser.parse_args()
    short, long = sorted(options.shape)
    chosen = projectors(options.rank)
    rows: list[dict[str, Any]] = [{"projector": name} for name in chosen]
    for spectrum in ("power", "exp", "flat"):
        old, new = drifting_pair(spectrum, short, long, options.rank)
        for start in ("cold", "warm"):
            for row, projector in zip(rows, chosen.values(), strict=True):
                energy, error = captured(projector, old, new, options.rank, start == "cold")
                row[f"{spectrum}, {start}"] = energy
                row["max|PᵀP-I|"] = max(error, row.pop("max|PᵀP-I|", 0.0))
    title = f"Captured energy / best rank-{options.rank} energy, {short}x{long}"
    report.publish(title, rows, "captured_energy")


def projectors(rank: int) -> dict[str, Projector]:
    """What is compared."""
    return {
        "svd": gj.projectors.svd(),
        "gram_eigh": gj.projectors.gram_eigh(),
        "randomized_svd (default)": gj.projectors.randomized_svd(),
        "randomized_svd, oversample r/4": gj.projectors.randomized_svd(oversample=rank // 4),
        "randomized_svd, 2 power_iters": gj.projectors.randomized_svd(power_iters=2),
        "subspace_iteration": gj.projectors.subspace_iteration(),
        "random_orthonormal": gj.projectors.random_orthonormal(),
    }


def drifting_pair(spectrum: str, short: int, long: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """An old and a newer gradient ``[kept=long, projected=short]``."""
    rng = np.random.default_rng(0)

    def draw() -> np.ndarray:
        noise = rng.standard_normal((long, short))
        if spectrum == "flat":
            return noise
        i = np.arange(1, short + 1)
        values = 1 / i if spectrum == "power" else np.exp(-4 * i / rank) + 1e-4
        right = np.linalg.qr(rng.standard_normal((short, short)))[0]
        return (np.linalg.qr(noise)[0] * values) @ right.T

    old = draw()
    return old, 0.9 * old + 0.1 * draw()


def captured(
    projector: Projector, old: np.ndarray, new: np.ndarray, rank: int, cold: bool
) -> tuple[float, float]:
    """Share of the best energy that the basis found from `new` captures; its orthonormality."""
    previous = np.eye(old.shape[1], rank) if cold else _leading(old, rank)

    view = matrix_view(new.shape, gj.MatrixAxes(), "output")

    @jax.jit
    def find(gradient: jax.Array, previous: jax.Array) -> jax.Array:
        return projector.basis(
            dense_operator(gradient, view),
            rank,
            previous=previous,
            refreshes=jnp.int32(0 if cold else 1),
            key=jnp.zeros(2, jnp.uint32),
        )

    found = find(jnp.asarray(new, jnp.float32), jnp.asarray(previous, jnp.float32))
    basis = np.asarray(found, np.float64)
    best = np.sum((new @ _leading(new, rank)) ** 2)
    # Energy of the subspace, not of the columns: exact even for slightly skewed columns.
    clean = np.linalg.qr(basis)[0]
    error = np.max(np.abs(basis.T @ basis - np.eye(rank)))
    return float(np.sum((new @ clean) ** 2) / best), float(error)


def _leading(matrix: np.ndarray, rank: int) -> np.ndarray:
    return np.linalg.eigh(matrix.T @ matrix)[1][:, ::-1][:, :rank]


if __name__ == "__main__":
    main()
