"""What to read, how to cut it into tokens, where to keep them."""

import dataclasses
import os
from pathlib import Path

SOURCES = ("sotu", "files", "c4", "tokens")
SPLITS = ("document", "tail")
TOKEN_SUFFIXES = (".npy", ".bin")


def default_cache_dir() -> str:
    """Returns the user's cache directory for token files (``XDG_CACHE_HOME`` is honoured)."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(root) / "galore_jax")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data.

    Raises:
        ValueError: names the field that is wrong.
    """

    source: str = "sotu"
    """Where text comes from: sotu (US State of the Union addresses, an installed package), files
    (C4-shaped *.json.gz, *.jsonl, *.jsonl.gz, *.parquet with a field `text`, or any text file; see
    paths), c4 (allenai/c4, streamed from the hub; needs max_tokens), tokens (a ready .npy or .bin
    file of uint16 token ids). Anything else is taken for a path or pattern of files or tokens."""

    paths: tuple[str, ...] = ()
    """Files or glob patterns for the sources files and tokens. Two token files are training and
    validation; one is split at its last 2 %."""

    tokenizer: str = "bpe"
    """bpe (byte-level, trained on the training documents), bytes, or the path of a tokenizer.json
    or of a SentencePiece .model."""

    vocab_size: int = 4096
    """Vocabulary of the trained BPE; for ready token files the vocabulary that they were made
    with. The other tokenizers bring their own."""

    seq_len: int = 128
    """Tokens that a training sequence predicts."""

    split: str = "document"
    """document: every 20th document is validation. tail: the last 2 % of every document, for few
    long documents such as books. A lone document is always split by its tail."""

    max_tokens: int | None = None
    """Stop after this many training tokens (validation tokens come on top)."""

    cache_dir: str | None = None
    """Token files are kept here, one directory per corpus and tokenizer [None: galore_jax in the
    user's cache directory]."""

    seed: int = 0
    """Of the order of the training sequences."""

    def __post_init__(self):
        object.__setattr__(self, "cache_dir", str(self.cache_dir or default_cache_dir()))
        if self.source not in SOURCES and not self.paths:
            kind = "tokens" if self.source.endswith(TOKEN_SUFFIXES) else "files"
            object.__setattr__(self, "paths", (self.source,))
            object.__setattr__(self, "source", kind)
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}; got {self.source!r}")
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {self.split!r}")
        takes_paths = self.source in ("files", "tokens")
        if takes_paths and not self.paths:
            raise ValueError(f"source {self.source!r} needs paths: the files to read")
        if self.paths and not takes_paths:
            raise ValueError(
                f"paths are read by the sources files and tokens, not by {self.source!r}; "
                f"got paths {self.paths}"
            )
        for name in ("vocab_size", "seq_len", "max_tokens"):
            value = getattr(self, name)
            if value is None and name == "max_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.source == "c4" and self.max_tokens is None:
            raise ValueError(
                "source 'c4' needs max_tokens: the whole corpus has about 156 billion tokens. "
                "Give at least steps x batch size x sequence length to see no token twice"
            )
