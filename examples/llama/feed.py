"""Batches of a corpus, spread over the devices; every process reads the rows that its own need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from examples.llama import config, data
from examples.llama.step import Batch


class Share(NamedTuple):
    """One of `count` equal parts of every batch."""

    index: int
    count: int


def own_share(sharding: NamedSharding, rows: int) -> Share:
    """The smallest share of a batch that has all rows which this process's devices need.

    Processes may have the same one: they do when the model is split over them, not the batch.
    """
    needed = sharding.addressable_devices_indices_map((rows,)).values()
    spans = [index[0].indices(rows) for index in needed]
    first, end = min(span[0] for span in spans), max(span[1] for span in spans)
    size = end - first
    # Rows that lie far apart: reading a little too much is better than a special case.
    return Share(0, 1) if rows % size or first % size else Share(first // size, rows // size)


def to_devices(sharding: NamedSharding, rows: int, share: Share) -> Callable[[Any], Batch]:
    """Makes a function that turns this process's rows into arrays of all processes."""
    first = share.index * (rows // share.count)

    def place(own: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, end, _ = index[0].indices(rows)
            return own[start - first : end - first]

        return jax.make_array_from_callback((rows, *own.shape[1:]), sharding, shard)

    return lambda batch: jax.tree.map(place, batch)


class Training:
    """Endless training batches from a position; `position` is the same on all processes."""

    def __init__(
        self,
        settings: config.TrainConfig,
        corpus: data.Corpus,
        sharding: NamedSharding,
        position: Any,
    ):
        rows = settings.data.batch_size
        share = own_share(sharding, rows)
        self._batches = data.train_batches(
            corpus,
            seq_len=settings.data.seq_len,
            batch_size=rows,
            seed=settings.run.seed,
            process_index=share.index,
            process_count=share.count,
        )
        if position is not None:
            self._batches.set_state(position)
        self._to_devices = to_devices(sharding, rows, share)

    def __next__(self) -> Batch:
        return self._to_devices(next(self._batches))

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self._batches.close()

    @property
    def position(self) -> Any:
        """Where to go on; a JSON value."""
        return self._batches.get_state()


def validation(
    settings: config.TrainConfig, corpus: data.Corpus, sharding: NamedSharding
) -> Iterator[Batch]:
    """The part of the validation data that is evaluated on, always the same."""
    rows = settings.data.batch_size
    share = own_share(sharding, rows)
    batches = data.valid_batches(
        corpus,
        seq_len=settings.data.seq_len,
        batch_size=rows,
        max_batches=settings.run.eval_batches or None,
        process_index=share.index,
        process_count=share.count,
    )
    return map(to_devices(sharding, rows, share), batches)
