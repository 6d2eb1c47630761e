"""Tokenizers behind one small interface."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from examples.llama.data.config import DataConfig

END_OF_DOCUMENT = "<|endoftext|>"
# What published vocabularies call the token that ends a document.
KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "[SEP]")
SMALLEST_BPE = 257  # 256 bytes and the end of a document
BPE_SAMPLE_CHARS = 64 * 2**20  # bounds the time and memory of training a BPE on a big corpus
BPE_FILE = "tokenizer.json"


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        name: for people.
        vocab_size: ids are in ``range(vocab_size)``.
        eod_id: the token that ends a document; no text encodes to it.
    """

    name: str
    vocab_size: int
    eod_id: int

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Iterable[int]) -> str:
        """Inverts ``encode``; ends of documents and ids beyond the vocabulary are left out."""
        ...


class ByteTokenizer:
    """UTF-8 bytes."""

    name = "bytes"
    vocab_size = 257
    eod_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < self.eod_id).decode(errors="replace")


class HuggingFaceTokenizer:
    """A ``tokenizer.json``.

    Args:
        path: the file. A vocabulary that knows no token for the end of a document gains one.
        name: for people.

    Raises:
        ValueError: the file is not such a vocabulary.
    """

    def __init__(self, path: Path, name: str):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is no tokenizer.json ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A document that spells a special token must not end there.
        self._tokenizer.encode_special_tokens = True
        self.name = name
        self.eod_id = self._end_of_document()
        # The largest id, not the number of entries: ids may have gaps.
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def _end_of_document(self) -> int:
        for token in KNOWN_ENDS:
            end = self._tokenizer.token_to_id(token)
            if end is not None:
                return end
        self._tokenizer.add_special_tokens([END_OF_DOCUMENT])
        return self._tokenizer.token_to_id(END_OF_DOCUMENT)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids if i < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=True)


class SentencePieceTokenizer:
    """A SentencePiece ``.model``; one without an end of sentence gains an id for it.

    Args:
        path: the file.

    Raises:
        ValueError: the file is not such a model.
    """

    def __init__(self, path: Path):
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.Load(str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} is no SentencePiece model ({error})") from error
        self.name = path.name
        pieces, end = self._processor.vocab_size(), self._processor.eos_id()
        self.vocab_size = pieces if end >= 0 else pieces + 1
        self.eod_id = end if end >= 0 else pieces

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids if i < self.vocab_size and i != self.eod_id]
        return self._processor.decode(known)


class TokensOnly:
    """Stands for the unknown vocabulary of a ready token file.

    Args:
        vocab_size: what its ids are in range of.
    """

    name = "ready tokens"

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.eod_id = vocab_size  # none of the ids

    def encode(self, text: str) -> list[int]:
        raise ValueError(
            "a ready token file does not say how text becomes tokens: name its tokenizer.json "
            "or .model as the tokenizer"
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(int(i)) for i in ids)


def identity(config: DataConfig) -> str:
    """Names what ``make`` would build, by content: part of the key of a token cache."""
    if config.tokenizer == "bpe":
        if config.vocab_size < SMALLEST_BPE:
            raise ValueError(
                f"vocab_size {config.vocab_size} is too small for a byte-level BPE: it needs at "
                f"least {SMALLEST_BPE}"
            )
        return f"bpe {config.vocab_size}"
    if config.tokenizer == "bytes":
        return "bytes"
    return hashlib.blake2b(_file(config).read_bytes()).hexdigest()


def load(config: DataConfig, bpe_file: Path) -> Tokenizer:
    """Loads the tokenizer that ``config`` names.

    Args:
        config: the data.
        bpe_file: where ``train_bpe`` left its vocabulary, read for tokenizer bpe.

    Returns:
        The tokenizer.

    Raises:
        ValueError: the file is missing or is no vocabulary.
    """
    if config.tokenizer == "bpe":
        return HuggingFaceTokenizer(bpe_file, "byte-level BPE")
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    path = _file(config)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, path.name)
    return SentencePieceTokenizer(path)


def _file(config: DataConfig) -> Path:
    path = Path(config.tokenizer).expanduser()
    if not path.is_file():
        raise ValueError(
            f"tokenizer {config.tokenizer!r}: no such file (looked from {Path.cwd()}). "
            "Give bpe, bytes, or the path of a tokenizer.json or a SentencePiece .model"
        )
    return path


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains a byte-level BPE; the same texts give the same file.

    Args:
        texts: training documents; the first 64 Mi characters are used.
        vocab_size: entries wanted, the end of a document included; a small corpus yields fewer.
        path: the ``tokenizer.json`` to write.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)
    tokenizer.save(str(path), pretty=False)


def _sample(texts: Iterable[str]) -> Iterator[str]:
    left = BPE_SAMPLE_CHARS
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return
