"""Which text trains and which validates."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np

VALID_EVERY = 20
TAIL = 0.02
FILTER_BITS = 27


class Piece(NamedTuple):
    """A document, or the part of one that lies on one side of the split."""

    part: Literal["train", "valid"]
    text: str


def split_documents(documents: Iterable[str], how: str) -> Iterator[list[Piece]]:
    """Assigns every document, in one pass.

    Args:
        documents: the corpus.
        how: ``"document"`` or ``"tail"`` (see ``DataConfig.split``).

    Yields:
        The pieces of one document at a time.
    """
    documents = iter(documents)
    first = list(itertools.islice(documents, 2))
    documents = itertools.chain(first, documents)
    if how == "tail" or len(first) == 1:
        return map(split_tail, documents)
    return _split_by_document(documents)


def split_tail(text: str) -> list[Piece]:
    """Holds out the last 2 % of one document.

    The cut is moved back to where a paragraph ends, or a line, or a word, whichever of them is
    found first within a tenth of the document.
    """
    latest = int(len(text) * (1 - TAIL))
    earliest = int(len(text) * 0.9 * (1 - TAIL))
    for boundary in ("\n\n", "\n", " "):
        at = text.rfind(boundary, earliest, latest)
        if at > 0:
            latest = at + len(boundary)
            break
    pieces = [Piece("train", text[:latest]), Piece("valid", text[latest:])]
    return [piece for piece in pieces if piece.text.strip()]


def _split_by_document(documents: Iterator[str]) -> Iterator[list[Piece]]:
    train, valid = _Seen(), _Seen()
    for index, text in enumerate(documents):
        held_out = index % VALID_EVERY == 0
        # A copy of a document goes where the first one went, or nowhere, so that nothing that is
        # validated on was trained on.
        if held_out and text not in train:
            valid.add(text)
            yield [Piece("valid", text)]
        elif text not in valid:
            train.add(text)
            yield [Piece("train", text)]


class _Seen:
    """A set of texts in 16 MiB, however many they are.

    It remembers a hash of each. Two documents that share one (one pair in 10^8) are taken for
    copies, which moves or drops a document and never lets one leak.
    """

    def __init__(self):
        self._bits = np.zeros(2**FILTER_BITS // 8, np.uint8)

    def _slot(self, text: str) -> tuple[int, int]:
        digest = hashlib.blake2b(text.strip().encode(), digest_size=8).digest()
        slot = int.from_bytes(digest, "little") % 2**FILTER_BITS
        return slot // 8, 1 << slot % 8

    def add(self, text: str) -> None:
        byte, bit = self._slot(text)
        self._bits[byte] |= bit

    def __contains__(self, text: str) -> bool:
        byte, bit = self._slot(text)
        return bool(self._bits[byte] & bit)
