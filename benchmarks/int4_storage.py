"""Where to put 4-bit codes: two to a byte, or JAX's own 4-bit types. And which way blocks run.

    python -m benchmarks.int4_storage [--size 350M] [--repeats 15]

The bases of one block, on eight simulated devices. Bytes are those of the compiled program's
arguments.
"""

import argparse
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np

import galore_jax as gj
from benchmarks import report
from benchmarks.llama_block import TRIAL_SIZES, BlockSize, random_block
from galore_jax.quant import packing
from galore_jax.quant.array import quantize

Pair = tuple[Callable[[Any], Any], Callable[[Any], Any]]


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--size", default="350M", choices=TRIAL_SIZES)
    options = parser.parse_args()
    size = TRIAL_SIZES[options.size]
    report.publish(
        f"4-bit storage of codes, one {options.size} block of bases",
        _storage(size, options.repeats),
        "int4_storage",
    )
    report.publish(
        "Which way the blocks of an INT4 basis run: relative error", _blocks(size), "int4_blocks"
    )


def _bases(size: BlockSize) -> list[jax.Array]:
    """Orthonormal bases as a refresh leaves them: of gradients whose spectrum decays."""
    bases = []
    for matrix in random_block(size, 0).values():
        short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        rows = 1.0 / np.arange(1, short.shape[0] + 1)[:, None]
        # Features of very different size, as in a trained model: columns are not spread evenly.
        features = np.exp(np.random.default_rng(1).normal(size=(short.shape[0], 1)))
        left = jnp.linalg.svd(features * (rows * np.asarray(short)), full_matrices=False)[0]
        bases.append(left[:, : size.rank])
    return bases


def _storage(size: BlockSize, repeats: int) -> list[dict[str, Any]]:
    codes = [quantize(basis, bits=4, axis=-2) for basis in _bases(size)]
    plain = [packing.unpack(q.codes, q.length, 4, -2) for q in codes]
    ways: dict[str, Pair] = {
        "two a byte (ours)": (
            lambda x: packing.pack(x, 4, -2),
            lambda x: packing.unpack(x, size.width, 4, -2).astype(jnp.float32),
        ),
        "jnp.uint4": (lambda x: x.astype(jnp.uint4), lambda x: x.astype(jnp.float32)),
        "jnp.int4": (
            lambda x: (x.astype(jnp.int8) - 8).astype(jnp.int4),
            lambda x: x.astype(jnp.float32) + 8,
        ),
    }
    steps, rows = {}, []
    for name, (pack, unpack) in ways.items():
        stored = jax.jit(lambda xs, pack=pack: [pack(x) for x in xs])(plain)
        decode = jax.jit(lambda xs, unpack=unpack: [unpack(x) for x in xs])
        encode = jax.jit(lambda xs, pack=pack: [pack(x) for x in xs])
        steps[f"{name}/decode"] = lambda f=decode, x=stored: f(x)
        steps[f"{name}/encode"] = lambda f=encode, x=plain: f(x)
        arguments = decode.lower(stored).compile().memory_analysis().argument_size_in_bytes
        rows.append(
            {
                "storage": name,
                "bytes per code": arguments / sum(x.size for x in plain),
                "nbytes per code": sum(x.nbytes for x in stored) / sum(x.size for x in plain),
                "saved by Orbax": _saved(stored),
                "sharded in 8 along its columns": _sharded(stored[0]),
            }
        )
    times = report.interleaved(steps, repeats)
    for row in rows:
        for what in ("decode", "encode"):
            best, median = times[f"{row['storage']}/{what}"]
            row |= {f"{what}, ms": best * 1e3, f"{what}, ms, median": median * 1e3}
    return rows


def _saved(stored: Any) -> str:
    logging.disable(logging.CRITICAL)  # Orbax logs the error that it raises
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from orbax.checkpoint import v1

        with tempfile.TemporaryDirectory() as directory:
            try:
                v1.save_checkpointables(Path(directory) / "x", {"state": stored})
            except Exception as error:
                return f"no: {type(error).__name__}"
    return "yes"


def _sharded(x: jax.Array) -> str:
    devices = np.array(jax.devices())
    if len(devices) < 8:
        return "not tried: fewer than 8 devices"
    mesh = jax.sharding.Mesh(devices[:8], ("data",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None))
    try:
        jax.block_until_ready(jax.device_put(x, spec))
    except Exception as error:
        return f"no: {type(error).__name__}"
    return "yes"


def _blocks(size: BlockSize) -> list[dict[str, Any]]:
    def error(decoded: jax.Array, basis: jax.Array) -> float:
        return float(jnp.linalg.norm(decoded - basis) / jnp.linalg.norm(basis))

    ways: dict[str, Callable[[jax.Array], jax.Array]] = {
        "along columns (ours)": lambda x: gj.quant.dequantize(quantize(x, bits=4, axis=-2)),
        "along rows": lambda x: gj.quant.dequantize(quantize(x, bits=4, axis=-1)),
        "flat, row by row": lambda x: gj.quant.dequantize(quantize(x.reshape(-1), bits=4)).reshape(
            x.shape
        ),
    }
    rows = []
    for name, way in ways.items():
        bases = _bases(size)
        decoded = [way(basis) for basis in bases]
        gram = max(float(jnp.max(jnp.abs(d.T @ d - jnp.eye(d.shape[1])))) for d in decoded)
        rows.append(
            {
                "blocks of 256": name,
                "relative error": float(
                    np.mean([error(d, b) for d, b in zip(decoded, bases, strict=True)])
                ),
                "max|PᵀP-I|": gram,
            }
        )
    return rows


if __name__ == "__main__":
    main()
