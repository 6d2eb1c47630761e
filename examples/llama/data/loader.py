"""Batches of windows of a token file."""

import functools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from examples.llama.data.tokens import Corpus, check_length

Batch = dict[str, np.ndarray]


class Windows:
    """Consecutive windows of a token file, as a Grain data source.

    Neighbours share one token: the last target of one is the first input of the next.

    Args:
        tokens: ids [tokens].
        seq_len: S.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int):
        self._tokens = tokens
        self._seq_len = seq_len

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._seq_len

    def __getitem__(self, index: int) -> Batch:
        start = int(index) * self._seq_len
        window = self._tokens[start : start + self._seq_len + 1].astype(np.int32)
        return {"inputs": window[:-1], "targets": window[1:]}


class TrainBatches:
    """Endless batches of one share; the position counts windows, whoever read them.

    Args:
        windows: all of them, in order.
        batch_size: windows per step over all shares.
        index: of the share: a run of consecutive rows of every batch.
        count: number of shares.
    """

    def __init__(self, windows: grain.MapDataset, batch_size: int, index: int, count: int):
        self._windows, self._batch_size = windows, batch_size
        self._index, self._count = index, count
        self._position = 0

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        batch = next(self._reader)
        self._position += self._batch_size
        return batch

    def get_state(self) -> dict[str, int]:
        return {"global_next_index": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self._position = state["global_next_index"]

    def close(self) -> None:
        """Ends the threads that read ahead."""
        if reader := self.__dict__.pop("_reader", None):
            reader.close()

    @functools.cached_property
    def _reader(self) -> Any:
        rows = self._windows[self._position :].batch(
            self._batch_size // self._count, drop_remainder=True
        )
        # Counted in batches. Windows come from a memory map: this stays ahead of a training step.
        read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        return iter(rows[self._index :: self._count].to_iter_dataset(read_options=read))


def train_batches(
    corpus: Corpus,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """Iterates over the training windows for ever, shuffled anew in each epoch.

    The order depends on ``seed`` alone. ``get_state()`` is a small JSON-able dictionary, equal on
    all processes, and any number of processes (and any batch size) goes on from it with
    ``set_state(state)``: after k calls of ``next`` it leads to batch k.

    Args:
        corpus: the tokens.
        seq_len: S.
        batch_size: sequences per step over all processes.
        seed: of the order.
        process_index: which share of every batch to yield: consecutive rows.
        process_count: number of shares.

    Returns:
        Iterator of ``{"inputs", "targets"}``, int32 [batch_size / process_count, S].

    Raises:
        ValueError: the batch cannot be shared equally, or the corpus has no window.
    """
    _check_shares(batch_size, process_index, process_count)
    check_length(corpus, seq_len)
    windows = grain.MapDataset.source(Windows(corpus.train, seq_len)).seed(seed).shuffle().repeat()
    return TrainBatches(windows, batch_size, process_index, process_count)


def valid_batches(
    corpus: Corpus,
    *,
    seq_len: int,
    batch_size: int,
    max_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Iterates once over the validation tokens, in order.

    Every token but the first of the file, which has no context, is the target of exactly one
    position of weight 1. Padding of the last window and the last batch has weight 0, so batches
    have one shape. The mean over the corpus is the mean of the batch losses weighted by the sums
    of their weights.

    Args:
        corpus: the tokens.
        seq_len: S.
        batch_size: sequences per batch over all processes.
        max_batches: stop early.
        process_index: which share of every batch to yield.
        process_count: number of shares.

    Returns:
        Iterator of ``{"inputs", "targets"}``, int32 [batch_size / process_count, S], and
        ``"weights"``, float32 of the same shape.

    Raises:
        ValueError: the batch cannot be shared equally.
    """
    _check_shares(batch_size, process_index, process_count)
    check_length(corpus, seq_len)
    return _valid_batches(
        corpus.valid, seq_len, batch_size, max_batches, process_index, process_count
    )


def _valid_batches(
    tokens: np.ndarray,
    seq_len: int,
    batch_size: int,
    max_batches: int | None,
    process_index: int,
    process_count: int,
) -> Iterator[Batch]:
    span = batch_size * seq_len
    rows = slice(
        process_index * batch_size // process_count,
        (process_index + 1) * batch_size // process_count,
    )
    starts = range(0, len(tokens) - 1, span)[:max_batches]
    for start in starts:
        piece = np.asarray(tokens[start : start + span + 1], np.int32)
        count = len(piece) - 1
        flat = {"inputs": piece[:-1], "targets": piece[1:], "weights": np.ones(count, np.float32)}
        yield {
            name: np.pad(values, (0, span - count)).reshape(batch_size, seq_len)[rows]
            for name, values in flat.items()
        }


def _check_shares(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by the number of processes "
            f"{process_count}: choose a positive multiple of it"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in range({process_count})")
