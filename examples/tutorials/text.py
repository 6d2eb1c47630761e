"""What the tutorials read: State of the Union addresses as ASCII codes, in random windows."""

import itertools
from collections.abc import Iterator

import numpy as np

from examples.llama.data.config import DataConfig
from examples.llama.data.corpus import open_source

VOCAB = 128
DOCUMENTS = 40  # about a million characters


def batches(steps: int, *, seed: int = 0, rows: int = 16, length: int = 64) -> Iterator[np.ndarray]:
    """Yields `steps` arrays ``[rows, length + 1]``; the last column is only predicted."""
    documents = itertools.islice(open_source(DataConfig()).documents(), DOCUMENTS)
    text = np.frombuffer("\n".join(documents).encode("ascii", "ignore"), np.uint8)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        starts = rng.integers(text.size - length, size=(rows, 1))
        yield text[starts + np.arange(length + 1)].astype(np.int32)
