"""What is not to be trained on, and what a run must not go on with."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.ground import Fault, Ground, Outcome
from benchmarks.faults.runs import VARIANTS, VOCAB, Run, insist
from benchmarks.faults.storage import flip_a_bit, truncate
from examples.llama import train


def corpora(ground: Ground) -> Iterator[Fault]:
    """Corpora that are damaged, empty, too short, or made for another vocabulary."""
    harms: dict[str, tuple[Callable[[Path], Any], str]] = {
        "cut short": (truncate, "is no .npy file"),
        "empty": (lambda path: path.write_bytes(b""), "is no token file"),
        "no tokens": (_save(np.zeros(0, np.uint16)), "is no token file"),
        "too few tokens": (_save(np.zeros(9, np.uint16)), "too short"),
        "an id out of range": (_save(np.full(99, VOCAB, np.uint16)), "out of range"),
        "a negative id": (_save(np.full(99, -1, np.int32)), "out of range"),
        "fractions": (_save(np.zeros(99)), "is no token file"),
    }
    for name, (harm, wanted) in harms.items():
        yield Fault(name, lambda n=name, h=harm, w=wanted: _bad_corpus(ground, n, h, w))


def _save(tokens: np.ndarray) -> Callable[[Path], Any]:
    return lambda path: np.save(path, tokens)


def _bad_corpus(ground: Ground, name: str, harm: Callable[[Path], Any], wanted: str) -> Outcome:
    file = ground.directory / f"{name.replace(' ', '_')}.npy"
    file.write_bytes((ground.corpus / "train.npy").read_bytes())
    harm(file)
    run = ground.run(VARIANTS["plain"])
    status, said = run.call("--paths", str(file), str(ground.corpus / "valid.npy"))
    insist(status == train.FAILED, f"status {status}")
    squeezed = said.replace(" ", "")
    insist(wanted.replace(" ", "") in squeezed and file.name in squeezed, said[-300:])
    insist(not run.rows(), "trained on it")
    return Outcome(seen="refused by the name of the file")


def another_run(ground: Ground) -> Iterator[Fault]:
    """A checkpoint that belongs to another run than the one that is asked for."""
    reference = ground.reference(VARIANTS["plain"])
    for fault, line, wanted in (
        ("another rank", ("--rank", "2"), "rank:"),
        ("another side", ("--side", "long"), "side:"),
        ("another optimizer", ("--optimizer", "galore_lion"), "optimizer:"),
        ("another width", ("--hidden-size", "32"), "hidden_size:"),
        ("weights in int8", ("--weights", "int8"), "weights"),
        ("another seed", ("--seed", "1"), "seed:"),
    ):
        yield Fault(fault, lambda a=line, w=wanted: _refused(ground, reference, a, w))
    yield Fault("a corpus with a bit flipped", lambda: _other_corpus(ground, reference))
    yield Fault("another tokenizer", lambda: _other_tokenizer(ground))


def _refused(ground: Ground, reference: Run, line: tuple[str, ...], wanted: str) -> Outcome:
    run = ground.copy(reference)
    before = _fingerprint(run.directory)
    status, said = run.call("--resume", *line)
    insist(status == train.FAILED, f"status {status}")
    insist(wanted in said, said[-300:])
    insist(_fingerprint(run.directory) == before, "something in the directory has changed")
    return Outcome(seen="refused by name, the directory unchanged")


def _other_corpus(ground: Ground, reference: Run) -> Outcome:
    file = ground.directory / "flipped.npy"
    file.write_bytes((ground.corpus / "train.npy").read_bytes())
    flip_a_bit(file)
    line = ("--paths", str(file), str(ground.corpus / "valid.npy"))
    return _refused(ground, reference, line, "corpus fingerprint:")


def _other_tokenizer(ground: Ground) -> Outcome:
    text = ground.directory / "text.jsonl"
    letters = np.random.default_rng(0).integers(97, 123, size=(60, 400), dtype=np.uint8)
    documents = [json.dumps({"text": row.tobytes().decode()}) for row in letters]
    text.write_text("\n".join(documents) + "\n")
    options = VARIANTS["plain"] | {
        "source": "files",
        "paths": (text,),
        "cache-dir": ground.directory / "texts",
        "tokenizer": "bytes",
        "vocab-size": 300,
        "steps": 3,
    }
    run = ground.run(options)
    status, said = run.call()
    insist(status == train.FINISHED, said[-300:])
    return _refused(ground, run, ("--tokenizer", "bpe"), "corpus fingerprint:")


def _fingerprint(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }
