"""What is trained on what, and where: a run before anything of it is allocated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

import galore_jax as gj
from examples.llama import config, data, feed, gradients, mesh, model, objective, optimizers, step


class Task(NamedTuple):
    """A run before it starts.

    Args:
        settings: the options, without a None.
        corpus: what is learned from; None for a task that is only planned.
        llama: the model.
        loss_fn: of parameters and a batch.
        schedule: learning rate of a step.
        tx: the optimizer.
        devices: one line about them.
        template: the training state as `jax.ShapeDtypeStruct`s, each with its place.
        batch_sharding: the place of a batch.
        new_state: makes the state at the beginning, every array in its place.
    """

    settings: config.TrainConfig
    corpus: data.Corpus | None
    llama: model.LlamaConfig
    loss_fn: gradients.LossFn
    schedule: optax.Schedule
    tx: optax.GradientTransformationExtraArgs
    devices: str
    template: step.TrainState
    batch_sharding: NamedSharding
    new_state: Callable[[], step.TrainState]

    @property
    def state_sharding(self) -> step.TrainState:
        """Where the arrays of the training state are."""
        return jax.tree.map(lambda x: x.sharding, self.template)

    def train_step(self, rounding_key: jax.Array | None) -> step.TrainStep:
        """From a training state and a batch to the next state, as the settings say."""
        projected = self.settings.optimizer.backward == "projected"
        rest = {"rounding_key": rounding_key, "state_sharding": self.state_sharding}
        if not self.settings.schedule.layerwise:
            update = gradients.update_maker(
                self.loss_fn,
                self.tx,
                projected=projected,
                micro_batches=self.settings.data.accumulation,
            )
            return step.make_train_step(
                update,
                self.schedule,
                diagnostics_every=self.settings.run.diagnostics_every,
                **rest,
            )
        pieces = step.Pieces(
            embed=lambda params, batch: model.embed(self.llama, params, batch["inputs"]),
            block=functools.partial(model.block, self.llama),
            head=functools.partial(objective.head_loss, self.llama),
        )
        tx = optimizers.make_layerwise_optimizer(
            self.settings.optimizer, self.schedule, seed=self.settings.run.seed
        )
        clip = self.settings.schedule.clip or None
        return step.make_layerwise_step(
            pieces,
            tx,
            self.schedule,
            clip=clip,
            projected=projected,
            micro_batches=self.settings.data.accumulation,
            **rest,
        )

    def training(self, position: object) -> feed.Training:
        """Training batches from a position on; None is the beginning."""
        return feed.Training(self.settings, self.corpus, self.batch_sharding, position)

    def validation(self) -> Iterator[gradients.Batch]:
        """The batches that are evaluated on."""
        return feed.validation(self.settings, self.corpus, self.batch_sharding)


def make_task(settings: config.TrainConfig) -> Task:
    """Puts corpus, model, optimizer and devices together.

    Raises:
        ValueError: they do not fit each other.
    """
    devices = mesh.make_mesh(settings.devices.mesh)
    mesh.check_batch(devices, settings.data.batch_size, settings.data.accumulation)
    corpus = data.prepare(config.data_config(settings))
    task = without_corpus(settings, devices, vocab_size=corpus.vocab_size)
    return task._replace(corpus=corpus, devices=mesh.describe(devices))


def without_corpus(
    settings: config.TrainConfig,
    devices: Mesh | AbstractMesh,
    *,
    vocab_size: int,
    attention: str = "auto",
) -> Task:
    """A task that has no data, and needs no devices before its state is made.

    Raises:
        ValueError: the options do not fit each other, or the mesh.
    """
    mesh.check_batch(devices, settings.data.batch_size, settings.data.accumulation)
    batch_sharding = mesh.batch_sharding(devices)
    llama = dataclasses.replace(
        config.model_config(settings, vocab_size),
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

    def draw() -> Any:
        params = model.init(llama, jax.random.key(settings.run.seed))
        return gj.quant.quantize_params(params) if settings.model.weights == "int8" else params

    begin = functools.partial(step.init_state, tx=tx)
    abstract = jax.eval_shape(lambda: begin(draw()))
    sharding = mesh.state_sharding(devices, tx, abstract)

    def new_state() -> step.TrainState:
        # In two programs: one of them would hold the drawn weights beside everything else.
        params = jax.jit(draw, out_shardings=sharding.params)()
        return jax.jit(begin, donate_argnums=0, out_shardings=sharding)(params)

    return Task(
        settings,
        corpus=None,
        llama=llama,
        loss_fn=functools.partial(objective.loss, llama),
        schedule=schedule,
        tx=tx,
        devices="",
        template=jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            abstract,
            sharding,
        ),
        batch_sharding=batch_sharding,
        new_state=new_state,
    )
