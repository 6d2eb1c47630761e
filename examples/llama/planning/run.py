"""A run as `train` would make it, without a corpus and without devices."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from examples.llama import config, mesh, step
from examples.llama.model import LlamaConfig
from examples.llama.task import Task, without_corpus


class Run(NamedTuple):
    """A run before it starts.

    Args:
        settings: the options, without a None.
        llama: the model.
        devices: of the mesh, abstract or not.
        state: the training state as `jax.ShapeDtypeStruct`s, each with its place.
        batch: the same of one batch.
        task: makes the training step.
    """

    settings: config.TrainConfig
    llama: LlamaConfig
    devices: Mesh | AbstractMesh
    state: step.TrainState
    batch: dict[str, Any]
    task: Task


def make_run(
    settings: config.TrainConfig, devices: Mesh | AbstractMesh, *, attention: str = "xla"
) -> Run:
    """Everything that has a shape.

    Args:
        settings: the options, without a None.
        devices: of the mesh, abstract or not.
        attention: the kernel.

    Raises:
        ValueError: the options do not fit each other, or the mesh.
    """
    task = without_corpus(
        settings, devices, vocab_size=settings.data.vocab_size, attention=attention
    )
    shape = settings.data.batch_size, settings.data.seq_len
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=task.batch_sharding)
    batch = {"inputs": tokens, "targets": tokens}
    return Run(settings, task.llama, devices, task.template, batch, task)


def abstract_mesh(text: str | None) -> AbstractMesh:
    """The mesh of ``--mesh``, of devices that need not exist; one device without it."""
    sizes = mesh.parse_axes(text or "data=1")
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
