"""What the compiler says of a training step; nothing of it is run or allocated."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from examples import cuda_target
from examples.llama import mesh
from examples.llama.planning.run import Run


class Compiled(NamedTuple):
    """Bytes of a compiled step on one device.

    Args:
        target: what it was compiled for.
        arguments: weights, optimizer state and a batch.
        temporaries: what is alive besides, as far as the compiler gave it a place: workspaces of
            libraries are not in it.
        peak: arguments, results and temporaries, buffers that serve twice counted once.
    """

    target: str
    arguments: int
    temporaries: int
    peak: int


def prepare(target: str, devices: int) -> None:
    """Makes JAX ready to compile for so many devices; call it before JAX computes anything."""
    if target == "cuda":
        cuda_target.prepare()
        return
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def target_mesh(target: str, text: str | None) -> Mesh:
    """The mesh of ``--mesh``, of devices to compile for.

    Raises:
        ValueError: nothing can be compiled for them here.
    """
    sizes = mesh.parse_axes(text or "data=1")
    count = math.prod(sizes.values())
    devices = np.asarray(_cuda_devices(count) if target == "cuda" else jax.devices()[:count])
    return Mesh(
        devices.reshape(tuple(sizes.values())),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
    )


def compile_step(run: Run, target: str) -> Compiled:
    """Compiles the step of `run`, whose mesh is a `target_mesh`."""
    key = jax.random.key(run.settings.run.seed)
    stochastic = run.settings.schedule.rounding == "stochastic"
    step = run.task.train_step(key if stochastic else None)
    memory = step.lower(run.state, run.batch).compile().memory_analysis()
    return Compiled(
        {"cuda": "H100", "cpu": "CPU"}[target],
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
    )


def _cuda_devices(count: int) -> list[jax.Device]:
    try:
        return cuda_target.h100(count)
    except Exception as error:  # whatever the plugin raises, if there is one
        raise ValueError(
            "--compile cuda: there is no CUDA compiler for this jax. It needs neither a GPU nor a "
            f"driver: pip install --no-deps jax-cuda12-plugin=={jax.__version__} "
            f"jax-cuda12-pjrt=={jax.__version__} nvidia-cuda-nvcc-cu12 ({error})"
        ) from error
