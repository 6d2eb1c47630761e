"""Text to batches: corpus -> documents -> tokens in a flat, cached file -> windows -> Grain."""

from examples.llama.data.config import DataConfig
from examples.llama.data.loader import train_batches, valid_batches
from examples.llama.data.tokens import Corpus, check_vocabulary, prepare

__all__ = [
    "Corpus",
    "DataConfig",
    "check_vocabulary",
    "prepare",
    "train_batches",
    "valid_batches",
]
