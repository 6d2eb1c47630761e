"""From a corpus to flat files of token ids, kept in a cache."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.llama.data import tokenizer as tokenizers
from examples.llama.data.cache import cached
from examples.llama.data.config import DataConfig
from examples.llama.data.corpus import TextSource, digest_files, find_files, open_source
from examples.llama.data.split import TAIL, Piece, split_documents
from examples.llama.data.tokenizer import Tokenizer, TokensOnly

FORMAT_VERSION = 1  # raise it when the same text would become other tokens
BATCH_CHARS = 4 * 2**20
CHUNK_CHARS = 2**20
SCAN_TOKENS = 2**24


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens to train and to validate on.

    Args:
        train: token ids [training tokens], in a file.
        valid: token ids [validation tokens], in a file.
        vocab_size: ids are in ``range(vocab_size)``.
        fingerprint: equal for equal text, split and tokenizer; compare it before resuming a run.
        unigram_nats: cross-entropy of the validation tokens under the (add-one smoothed) token
            frequencies of the training text: what a model without context reaches.
        description: one line for people.
        tokenizer: ``encode`` and ``decode``.
    """

    train: np.memmap
    valid: np.memmap
    vocab_size: int
    fingerprint: str
    unigram_nats: float
    description: str
    tokenizer: Tokenizer


def prepare(config: DataConfig) -> Corpus:
    """Tokenises the corpus, or finds the tokens of an earlier call in the cache.

    Args:
        config: the data.

    Returns:
        The corpus.

    Raises:
        ValueError: a file is missing or broken, or the corpus is too short.
        ImportError: a package that the source needs is not installed.
        ConnectionError: the hub cannot be reached.
    """
    corpus = _ready_tokens(config) if config.source == "tokens" else _from_text(config)
    check_length(corpus, config.seq_len)
    return corpus


def check_length(corpus: Corpus, seq_len: int) -> None:
    """Raises ``ValueError`` unless there is a training window and a token to validate on."""
    if len(corpus.train) < seq_len + 1 or len(corpus.valid) < 2:
        raise ValueError(
            f"the corpus is too short: {len(corpus.train)} training tokens and "
            f"{len(corpus.valid)} validation tokens, and seq_len {seq_len} needs at least "
            f"{seq_len + 1} and 2. Give more text, a smaller seq_len, or a larger max_tokens "
            f"({corpus.description})"
        )


def check_vocabulary(corpus: Corpus, vocab_size: int) -> None:
    """Raises ``ValueError`` unless a model with ``vocab_size`` embeddings can read the corpus."""
    if corpus.vocab_size > vocab_size:
        raise ValueError(
            f"token ids are out of range of the model's vocabulary: the tokens go up to "
            f"{corpus.vocab_size - 1}, the model has {vocab_size} embeddings. Give the model "
            f"vocab_size {corpus.vocab_size}, or use a smaller tokenizer ({corpus.description})"
        )


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the narrower of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def unigram_nats(train_counts: np.ndarray, valid_counts: np.ndarray) -> float:
    """Cross-entropy of validation tokens under add-one smoothed training frequencies.

    Args:
        train_counts: occurrences of each id [V].
        valid_counts: occurrences of each id [V].

    Returns:
        Mean nats per validation token.
    """
    log_probs = np.log(train_counts + 1.0) - np.log(train_counts.sum() + len(train_counts))
    return float(-(valid_counts @ log_probs) / valid_counts.sum())


def count_tokens(tokens: np.ndarray, vocab_size: int, name: str) -> np.ndarray:
    """Counts the occurrences of each id [V], a slice of the file at a time.

    Raises:
        ValueError: an id is not in ``range(vocab_size)``.
    """
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), SCAN_TOKENS):
        piece = np.asarray(tokens[start : start + SCAN_TOKENS])
        if piece.min() < 0 or piece.max() >= vocab_size:
            raise ValueError(
                f"{name}: token ids from {piece.min()} to {piece.max()} are out of range of the "
                f"vocabulary of {vocab_size}: set vocab_size (or tokenizer) to what the tokens "
                "were made with"
            )
        counts += np.bincount(piece, minlength=vocab_size)
    return counts


def _from_text(config: DataConfig) -> Corpus:
    source = open_source(config)
    recipe = (
        FORMAT_VERSION,
        source.digest,
        tokenizers.identity(config),
        config.split,
        config.max_tokens,
    )
    key = hashlib.blake2b(repr(recipe).encode(), digest_size=16).hexdigest()
    directory = Path(config.cache_dir).expanduser() / key
    facts = cached(directory, functools.partial(_build, config, source))
    dtype = np.dtype(facts["dtype"])
    return Corpus(
        train=np.memmap(directory / "train.bin", dtype, mode="r"),
        valid=np.memmap(directory / "valid.bin", dtype, mode="r"),
        vocab_size=facts["vocab_size"],
        fingerprint=facts["fingerprint"],
        unigram_nats=facts["unigram_nats"],
        description=facts["description"],
        tokenizer=tokenizers.load(config, directory / tokenizers.BPE_FILE),
    )


def _build(config: DataConfig, source: TextSource, directory: Path) -> dict[str, Any]:
    bpe_file = directory / tokenizers.BPE_FILE
    if config.tokenizer == "bpe":
        documents = split_documents(source.documents(), config.split)
        pieces = itertools.chain.from_iterable(documents)
        texts = (piece.text for piece in pieces if piece.part == "train")
        tokenizers.train_bpe(texts, config.vocab_size, bpe_file)
    tokenizer = tokenizers.load(config, bpe_file)
    dtype = token_dtype(tokenizer.vocab_size)
    documents = split_documents(source.documents(), config.split)
    written = write_tokens(documents, tokenizer, dtype, directory, config.max_tokens)
    train, valid = written["train"], written["valid"]
    if not train.tokens or not valid.tokens:
        raise ValueError(
            f"{source.name} is empty or too short to be split: {train.documents} training and "
            f"{valid.documents} validation documents with any text were found (repetitions of a "
            "document do not count). Give more text"
        )
    paths = [directory / f"{part}.bin" for part in ("train", "valid")]
    counts = [
        count_tokens(np.memmap(path, dtype, mode="r"), tokenizer.vocab_size, source.name)
        for path in paths
    ]
    # Of the tokens rather than of the recipe: a newer tokenizer library may train another BPE,
    # and the hub may stream another text.
    identity = bpe_file.read_bytes() if bpe_file.exists() else tokenizers.identity(config).encode()
    content = hashlib.blake2b(digest_files(paths).encode() + identity, digest_size=16)
    return {
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": content.hexdigest(),
        "unigram_nats": unigram_nats(*counts),
        "description": (
            f"{source.name}: {train.documents:,} training and {valid.documents:,} validation "
            f"documents, {train.tokens:,} and {valid.tokens:,} tokens, {tokenizer.name} with "
            f"{tokenizer.vocab_size:,} entries"
        ),
    }


@dataclasses.dataclass
class Written:
    """What one token file holds."""

    documents: int = 0
    tokens: int = 0


def write_tokens(
    documents: Iterable[list[Piece]],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    directory: Path,
    max_tokens: int | None,
) -> dict[str, Written]:
    """Streams documents to train.bin and valid.bin, each ended by the end-of-document token.

    Args:
        documents: pieces of each document, as ``split_documents`` gives them.
        tokenizer: encodes them.
        dtype: of the ids in the files.
        directory: gets the two files.
        max_tokens: the training file is cut there, after the document that it falls in nothing
            more is written.

    Returns:
        What went into each of the files.
    """
    written = {"train": Written(), "valid": Written()}
    train = written["train"]
    last_document = None
    with contextlib.ExitStack() as stack:
        files = {
            part: stack.enter_context((directory / f"{part}.bin").open("wb")) for part in written
        }
        for chunk, ids in _encode(_chunks(documents), tokenizer):
            if last_document is not None and chunk.document > last_document:
                break
            if chunk.part == "train" and max_tokens is not None:
                ids = ids[: max_tokens - train.tokens]
            np.asarray(ids, dtype).tofile(files[chunk.part])
            written[chunk.part].tokens += len(ids)
            written[chunk.part].documents += chunk.ends and bool(ids)
            if train.tokens == max_tokens:
                last_document = chunk.document
    return written


class _Chunk(NamedTuple):
    document: int
    part: str
    text: str
    ends: bool  # the piece of the document that it belongs to


def _chunks(documents: Iterable[list[Piece]]) -> Iterator[_Chunk]:
    """Cuts long texts before a space, so that no word and no call of the tokenizer grows big."""
    for document, pieces in enumerate(documents):
        for part, text in pieces:
            start = 0
            while start < len(text):
                end = start + CHUNK_CHARS
                if end < len(text):
                    space = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
                    end = space if space > start else end
                yield _Chunk(document, part, text[start:end], end >= len(text))
                start = end


def _encode(chunks: Iterator[_Chunk], tokenizer: Tokenizer) -> Iterator[tuple[_Chunk, list[int]]]:
    """Encodes many chunks per call, which the tokenizers do on all cores."""
    while batch := list(_take_chars(chunks, BATCH_CHARS)):
        encoded = tokenizer.encode_batch([chunk.text for chunk in batch])
        for chunk, ids in zip(batch, encoded, strict=True):
            yield chunk, [*ids, tokenizer.eod_id] if chunk.ends else ids


def _take_chars(chunks: Iterator[_Chunk], chars: int) -> Iterator[_Chunk]:
    for chunk in chunks:
        yield chunk
        chars -= len(chunk.text)
        if chars <= 0:
            return


def _ready_tokens(config: DataConfig) -> Corpus:
    paths = find_files(config.paths)
    if len(paths) > 2:
        raise ValueError(
            f"source tokens reads one file, or a training and a validation file; got {len(paths)}"
        )
    files = [open_tokens(path) for path in paths]
    if len(files) == 1:
        cut = int(len(files[0]) * (1 - TAIL))
        files = [files[0][:cut], files[0][cut:]]
    if config.tokenizer == "bpe":
        tokenizer = TokensOnly(config.vocab_size)
    else:
        tokenizer = tokenizers.load(config, Path())
    name = " and ".join(map(str, paths))
    train_counts, valid_counts = (
        count_tokens(tokens, tokenizer.vocab_size, name) for tokens in files
    )
    train, valid = files
    return Corpus(
        train=train,
        valid=valid,
        vocab_size=tokenizer.vocab_size,
        fingerprint=hashlib.blake2b(digest_files(paths).encode(), digest_size=16).hexdigest(),
        unigram_nats=unigram_nats(train_counts, valid_counts) if len(valid) else math.nan,
        description=(
            f"{name}: {len(train):,} training and {len(valid):,} validation tokens, vocabulary of "
            f"{tokenizer.vocab_size:,}"
        ),
        tokenizer=tokenizer,
    )


def open_tokens(path: Path) -> np.memmap:
    """Maps a flat file of token ids.

    Args:
        path: ``.npy`` with a one-dimensional integer array, or ``.bin`` with raw uint16.

    Returns:
        Token ids [tokens].

    Raises:
        ValueError: the file holds something else.
    """
    size = path.stat().st_size
    if path.suffix == ".bin" and size and size % 2 == 0:
        return np.memmap(path, np.uint16, mode="r")
    if path.suffix == ".npy" and size:
        try:
            tokens = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no .npy file of numbers ({error})") from error
        if tokens.ndim == 1 and np.issubdtype(tokens.dtype, np.integer) and len(tokens):
            return tokens
        seen = f"{tokens.dtype} of shape {tokens.shape}"
    else:
        seen = f"{size} bytes"
    raise ValueError(
        f"{path} is no token file (saw {seen}): give a .npy with a one-dimensional integer array, "
        "or a .bin with raw uint16 ids"
    )
