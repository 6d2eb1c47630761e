"""A run as `train` would make it, without a corpus and without devices."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

import galore_jax as gj
from examples.llama import config, mesh, model, objective, optimizers, step
from examples.llama.model import LlamaConfig
from examples.llama.task import Task


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
    rows, length = settings.data.batch_size, settings.data.seq_len
    mesh.check_batch(devices, rows, settings.data.accumulation)
    batch_sharding = mesh.batch_sharding(devices)
    llama = dataclasses.replace(
        config.model_config(settings, settings.data.vocab_size),
        activation_sharding=batch_sharding,
        attention=attention,
    )
    schedule = optimizers.make_schedule(
        learning_rate=settings.schedule.learning_rate,
        steps=settings.schedule.steps,
        warmup=settings.schedule.warmup,
    )
    tx = optimizers.make_optimizer(
        settings.optimizer, schedule, clip=settings.schedule.clip, seed=settings.run.seed
    )

    def new_state(key: jax.Array) -> step.TrainState:
        params = model.init(llama, key)
        if settings.model.weights == "int8":
            params = gj.quant.quantize_params(params)
        return step.init_state(params, tx)

    bare = jax.eval_shape(new_state, jax.eval_shape(lambda: jax.random.key(0)))
    state = _placed(bare, mesh.state_sharding(devices, tx, bare))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch_sharding)
    task = Task(
        settings,
        corpus=None,  # type: ignore[arg-type]  # nothing is read
        llama=llama,
        loss_fn=functools.partial(objective.loss, llama),
        schedule=schedule,
        tx=tx,
        devices="",
        template=state,
        batch_sharding=batch_sharding,
        new_state=lambda: new_state(jax.random.key(settings.run.seed)),
    )
    return Run(settings, llama, devices, state, {"inputs": tokens, "targets": tokens}, task)


def abstract_mesh(text: str | None) -> AbstractMesh:
    """The mesh of ``--mesh``, of devices that need not exist; one device without it."""
    sizes = mesh.parse_axes(text or "data=1")
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings
    )
