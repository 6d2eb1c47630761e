"""Directories that exist completely or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows, where two builders merely repeat each other's work
    fcntl = None

MANIFEST = "manifest.json"


def cached(directory: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Returns the facts about a directory of files, building the directory if need be.

    The files are written under another name and renamed together, so a killed builder leaves
    nothing that looks finished. Processes that want the same directory wait for one of them. Files
    that do not match the manifest any more are built again.

    Args:
        directory: where the files are to be.
        build: writes the files into the (empty) directory it is given; returns JSON-able facts.

    Returns:
        The facts, from the manifest.
    """
    facts = _verified(directory)
    if facts is not None:
        return facts
    directory.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{directory.name}."
    with _locked(directory.parent / f"{prefix}lock"):
        facts = _verified(directory)  # somebody else may have been faster
        if facts is not None:
            return facts
        for leftover in directory.parent.glob(f"{prefix}*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)  # of builders that died
        building = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=directory.parent))
        try:
            facts = build(building)
            files = {file.name: _fingerprint(file) for file in sorted(building.iterdir())}
            (building / MANIFEST).write_text(json.dumps({"facts": facts, "files": files}))
            # mkdtemp keeps others out; a shared cache is for everybody who may read its parent.
            building.chmod(0o755)
            _swap(building, directory)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return facts


def _verified(directory: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        files = manifest["files"]
        intact = bool(files) and all(
            _fingerprint(directory / name) == expected for name, expected in files.items()
        )
        return manifest["facts"] if intact else None
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None  # missing, cut short or overwritten: all the same to us


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        checksum = hashlib.file_digest(content, hashlib.blake2b).hexdigest()
    return {"bytes": file.stat().st_size, "blake2b": checksum}


def _swap(building: Path, directory: Path) -> None:
    try:
        os.replace(building, directory)
    except OSError:
        # A directory that is not empty cannot be replaced. What is there is damaged, or was put
        # there by a builder without locks and is as good as ours.
        damaged = Path(tempfile.mkdtemp(prefix=building.name, suffix=".tmp", dir=directory.parent))
        os.replace(directory, damaged)
        os.replace(building, directory)
        shutil.rmtree(damaged, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)  # the kernel frees it with the process
        yield
