"""Compiles updates and training steps for a TPU topology, without a TPU.

Needs the TPU compiler: ``pip install libtpu``.

python -m benchmarks.tpu_compile [--topology v5e:2x2]
"""

import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import galore_jax as gj
from benchmarks import hlo, report

LAYERS, WIDTH, OUTER, RANK, TOKENS = 4, 512, 1376, 128, 4096
OPTIONS = {"rank": RANK, "axes": gj.MatrixAxes(-2, -1)}
OPTIMIZERS = {
    "galore_adamw": gj.galore_adamw(1e-2, **OPTIONS),
    "galore_adamw8bit": gj.galore_adamw8bit(1e-2, **OPTIONS),
    "q_galore_adamw8bit": gj.q_galore_adamw8bit(1e-2, **OPTIONS),
    "galore_adafactor": gj.galore_adafactor(1e-2, **OPTIONS),
}
SPECS = {"up": PartitionSpec(None, "fsdp"), "down": PartitionSpec(None, None, "fsdp")}


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x2")
    options = parser.parse_args()
    topology = topologies.get_topology_desc(platform="tpu", topology_name=options.topology)
    mesh = Mesh(np.array(topology.devices), ("fsdp",))
    rows = [row(name, tx, mesh) for name, tx in OPTIMIZERS.items()]
    title = f"Compiled for TPU {options.topology}, parameters sharded over all devices (not run)"
    report.publish(title, rows, "tpu_compile")


def row(name: str, tx: optax.GradientTransformation, mesh: Mesh) -> dict[str, Any]:
    """An update from gradients, and a training step with the projected backward pass."""
    sharding = {leaf: NamedSharding(mesh, spec) for leaf, spec in SPECS.items()}
    shapes = {"up": (LAYERS, WIDTH, OUTER), "down": (LAYERS, OUTER, WIDTH)}
    params = {
        k: jax.ShapeDtypeStruct(shapes[k], jnp.bfloat16, sharding=sharding[k]) for k in shapes
    }
    placed = gj.state_sharding(tx, params, sharding)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        placed,
    )
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16, sharding=rows)

    def step(params: Any, state: Any, x: jax.Array) -> Any:
        loss, grads = gj.projected_value_and_grad(_loss, tx)(params, state, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    update = jax.jit(tx.update, out_shardings=(sharding, placed)).lower(params, state, params)
    training = jax.jit(step, out_shardings=(sharding, placed, None)).lower(params, state, x)
    found: dict[str, Any] = {"optimizer": name}
    for what, lowered in (("update", update), ("step", training)):
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        found[f"{what}: arguments, MB"] = memory.argument_size_in_bytes / 1e6
        found[f"{what}: temporaries, MB"] = memory.temp_size_in_bytes / 1e6
        found[f"{what}: MB reduced or gathered"] = sum(hlo.bytes_reduced(compiled.as_text())) / 1e6
    return found


def _loss(params: Any, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        return x + gj.matmul(jax.nn.silu(gj.matmul(x, weights["up"])), weights["down"]), None

    return jnp.mean(jax.lax.scan(layer, x, params)[0].astype(jnp.float32) ** 2)


if __name__ == "__main__":
    main()
