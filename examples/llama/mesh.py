"""Where parameters, optimizer state and batches lie on several devices.

One rule gives every parameter its place, from its path; the library derives the place of every
array of the optimizer's state from it. A mesh has any of three axes::

    data     copies of the model: each sees its own rows of a batch
    fsdp     the same for batches; and every matrix lies in shards, gathered when it is needed
    tensor   Megatron's split: heads and MLP features are computed where their weights are

On one device, a mesh of one device, all of this is the identity.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import galore_jax as gj
from examples.llama.optimizers import path_name
from examples.llama.step import TrainState

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# The first that is found in a leaf's path; the others are small, and replicated.
_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"blocks/.*/(q|k|v|gate|up)/kernel", (None, "fsdp", "tensor")),
    (r"blocks/.*/(o|down)/kernel", (None, "tensor", "fsdp")),
    (r"embed/embedding|lm_head/kernel", ("fsdp", "tensor")),
)


def parse_axes(text: str) -> dict[str, int]:
    """Reads ``data=2,fsdp=4``.

    Raises:
        ValueError: an unknown axis, one that comes twice, a size that is none.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES:
            raise ValueError(
                f"--mesh {text}: no axis is called {name!r}; give any of {', '.join(AXES)} with "
                f"their sizes, as data=2,fsdp=4"
            )
        if name in sizes:
            raise ValueError(f"--mesh {text}: {name} comes twice")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--mesh {text}: {name} needs a size of at least 1, as {name}=2")
        sizes[name] = int(size)
    return sizes


def make_mesh(text: str | None) -> Mesh:
    """The mesh of ``--mesh``: over all devices; without it over one, or all if there are processes.

    The first axis is the outermost: with several processes it is the one that spans them.

    Raises:
        ValueError: it has another number of devices than there are.
    """
    if text is None and jax.process_count() == 1:
        return Mesh(np.asarray(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    count = jax.device_count()
    sizes = parse_axes(text or f"data={count}")
    wanted = math.prod(sizes.values())
    if wanted != count:
        raise ValueError(
            f"--mesh {text} is made of {wanted} devices, but JAX finds {count} "
            f"({jax.devices()[0].platform}): the sizes have to multiply to {count}"
        )
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def describe(mesh: Mesh) -> str:
    """One line: how many devices of what kind, and their axes."""
    device = mesh.devices.flat[0]
    text = f"{mesh.size} x {device.device_kind}"
    if mesh.size > 1:
        text += f", {', '.join(f'{name}={size}' for name, size in mesh.shape.items())}"
    if jax.process_count() > 1:
        text += f", {jax.process_count()} processes"
    if idle := jax.device_count() - mesh.size:
        text += f" ({idle} more are idle: --mesh data={jax.device_count()} would use all)"
    return text


def param_spec(mesh: Mesh, name: str) -> PartitionSpec:
    """How the parameter of this path is sharded."""
    entries = next((entries for rule, entries in _RULES if re.search(rule, name)), ())
    return PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in entries))


def state_sharding(mesh: Mesh, tx: optax.GradientTransformation, state: TrainState) -> TrainState:
    """The place of every array of the training state.

    Args:
        mesh: the devices.
        tx: what `state.opt_state` belongs to.
        state: arrays or their `ShapeDtypeStruct`s; parameters may be stored as integer codes.

    Returns:
        A tree like `state` with a `NamedSharding` for each array.

    Raises:
        ValueError: an axis of the mesh does not divide a parameter; names it.
    """
    per_leaf = jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, param_spec(mesh, path_name(path))),
        jax.eval_shape(gj.quant.dequantize_params, state.params),
    )
    try:
        return TrainState(
            step=replicated(mesh),
            params=gj.quant.params_sharding(state.params, per_leaf),
            opt_state=gj.state_sharding(tx, state.params, per_leaf),
        )
    except ValueError as error:
        axes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
        raise ValueError(
            f"--mesh {axes}: {error} Or choose sizes of the model that it divides."
        ) from error


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over all copies and shards of the model."""
    axes = tuple(axis for axis in mesh.axis_names if axis in BATCH_AXES)
    return NamedSharding(mesh, PartitionSpec(axes or None))


def check_batch(mesh: Mesh, batch_size: int, accumulation: int) -> None:
    """Raises unless every device gets as many rows as any other of each micro-batch."""
    sizes = {name: size for name, size in mesh.shape.items() if name in BATCH_AXES}
    if batch_size // accumulation % math.prod(sizes.values()):
        axes = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"--batch-size {batch_size}"
            + (f" / --accumulation {accumulation}" if accumulation > 1 else "")
            + f": the rows of a step are shared by {axes}, which does not divide them"
        )


def bytes_per_device(state: Any) -> int:
    """What the arrays (or `ShapeDtypeStruct`s with shardings) take on the fullest device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )
