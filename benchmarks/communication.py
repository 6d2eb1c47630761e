"""Bytes that data parallelism reduces for the matrices of one Llama block, from compiled programs.

python -m benchmarks.communication [--sizes 60M 130M 350M 1B 7B]
"""

import argparse
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, PartitionSpec

import galore_jax as gj
from benchmarks import hlo, report
from benchmarks.llama_block import SIZES, TRIAL_SIZES, BlockSize

GAP = 200
SEVEN_B = {"7B": BlockSize(4096, 11008, 32, 1024)}
CHOICES = TRIAL_SIZES | SEVEN_B


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=[*SIZES, *SEVEN_B], choices=CHOICES)
    rows = [row(name, CHOICES[name]) for name in parser.parse_args().sizes]
    title = "Data parallelism, MB reduced per step for the matrices of one block (fp32)"
    report.publish(title, rows, "communication")


def row(name: str, size: BlockSize) -> dict[str, str | float]:
    """Reducing gradients first, against the lens that reduces what it needs."""
    local = gj.galore_adamw(1e-2, size.rank, axis_name="data")
    first = gj.galore_adamw(1e-2, size.rank)
    full, _ = hlo.bytes_reduced(compiled(size, first, reduce_first=True))
    ordinary, refresh = hlo.bytes_reduced(compiled(size, local, reduce_first=False))
    mean = ordinary + refresh / GAP
    return {
        "block": f"{name} (r {size.rank})",
        "full gradients": full / 1e6,
        "ordinary step": ordinary / 1e6,
        "ratio": ordinary / full,
        "rank / width": size.rank / size.width,
        "warm refresh, beyond that": refresh / 1e6,
        f"mean at gap {GAP} / full": mean / full,
    }


def compiled(size: BlockSize, tx: optax.GradientTransformation, *, reduce_first: bool) -> str:
    """HLO of one update from gradients that are local to eight devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in size.shapes.items()}
    gradients = {k: jax.ShapeDtypeStruct((8, *s), jnp.float32) for k, s in size.shapes.items()}

    def update(gradients, state, params):
        gradients = jax.tree.map(lambda g: g[0], gradients)
        if reduce_first:
            gradients = jax.lax.pmean(gradients, "data")
        return tx.update(gradients, state, params)

    spec = PartitionSpec
    mapped = jax.shard_map(
        update, mesh=mesh, in_specs=(spec("data"), spec(), spec()), out_specs=spec()
    )
    state = jax.eval_shape(tx.init, params)
    return jax.jit(mapped).lower(gradients, state, params).compile().as_text()


if __name__ == "__main__":
    main()
