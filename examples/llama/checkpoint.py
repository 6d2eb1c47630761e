"""Checkpoints that survive a crash, a full disk and a flipped bit.

A checkpoint is a directory named after its step. It is written under another name and renamed
when everything is on disk, so a directory with a plain name is complete::

    checkpoints/00000400/arrays/...       every leaf of the training state, by its path (Orbax)
    checkpoints/00000400/run.json         format, step, data position, identity, leaf shapes
    checkpoints/00000400/sha256.json      digest of each of the files
    checkpoints/00000500.partial/         being written, or abandoned by a crash: never read
    checkpoints/00000300.damaged/         failed its check on restore: kept for a post-mortem

Orbax's v1 interface is used (``orbax.checkpoint.experimental.v1`` in 0.12): v0 is declared legacy,
and v1's free functions leave the sequence of checkpoints to us. That is wanted: Orbax's own manager
lets a failed background save end the training, and does not notice a flipped bit.

Leaves are stored in one flat dictionary by their path in the state. It depends on no class of any
library, can be read by anyone, and lets an error name the leaf that does not fit.

Of several processes each writes and reads the shards of its devices, in a file system that all of
them see; everything else, from the digests to the renaming, is the business of process 0. It
publishes when the shards of all are there, so a process that dies, whichever and whenever, leaves
a finished checkpoint or none. What was saved on some devices can be restored on any others.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint.experimental import v1 as ocp

from examples.llama import host
from examples.llama.optimizers import path_name

PARTIAL, DAMAGED = ".partial", ".damaged"
_ARRAYS, _RUN, _DIGESTS = "arrays", "run.json", "sha256.json"
# Counts changes of the layout of optimizer states. Records without a number are of format 1, which
# kept the flags of a lens by leaf.
FORMAT = 2


class CheckpointError(RuntimeError):
    """No checkpoint can be used, or the one there is belongs to another run."""


class _Damaged(Exception):
    """This one checkpoint cannot be read; an older one may."""


class Checkpoints:
    """The checkpoints of one run: saved in the background, the newest `keep` of them kept.

    All processes of the run call the methods that save and restore, at the same point.

    Args:
        directory: where they live; created if absent.
        keep: how many finished ones to keep.
        warn: is told, in one sentence, what went wrong without stopping the run.
    """

    def __init__(self, directory: Path, *, keep: int, warn: Callable[[str], None] = warnings.warn):
        self.directory = directory.absolute()
        self.keep = keep
        self._warn = warn
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        host.from_leader(self._tidy)

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())

    def save(self, step: int, state: Any, run: dict[str, Any]) -> None:
        """Starts saving; returns when the state's buffers may be reused.

        A failure is reported by `warn` in the next `save` or `wait`, and costs this checkpoint
        only.
        """
        self.wait()
        leaves = _named_leaves(state)
        record = run | {
            "format": FORMAT,
            "step": step,
            "leaves": {k: _signature(x) for k, x in leaves.items()},
        }
        try:
            # Orbax refuses arrays without elements; they hold nothing that needs saving.
            response = ocp.save_checkpointables_async(
                self._path(step, PARTIAL),
                {_ARRAYS: {k: x for k, x in leaves.items() if x.size}},
                overwrite=True,
            )
        except Exception as error:
            future: concurrent.futures.Future[None] = concurrent.futures.Future()
            future.set_exception(error)
        else:
            future = self._worker.submit(self._finish, step, response, record)
        self._pending = step, future

    def wait(self) -> bool:
        """Waits for the save under way; False (and a warning) if it failed."""
        if self._pending is None:
            return True
        step, future = self._pending
        self._pending = None
        # What the others made of it is told by whether process 0, which publishes, got their part.
        error = future.exception()
        return host.from_leader(lambda: self._succeeded(step, error))

    def restore(self, template: Any, identity: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """The newest intact checkpoint as (state, run record); None if none was ever finished.

        Args:
            template: the state as `jax.ShapeDtypeStruct`s with shardings.
            identity: what must be equal between the saved run and this one.

        Raises:
            CheckpointError: it belongs to a different run or to another version of the library, or
                none of several is intact.
        """
        self.wait()
        record = host.from_leader(lambda: self._newest_intact(template, identity))
        if record is None:
            return None
        return _read_arrays(self._path(record["step"]), template), record

    def close(self) -> None:
        """Waits for this process's part of the last save, and for no other process."""
        if self._pending:
            step, future = self._pending
            error = future.exception()
            if host.leads():
                self._succeeded(step, error)
        self._worker.shutdown()

    def _path(self, step: int, suffix: str = "") -> Path:
        return self.directory / f"{step:08d}{suffix}"

    def _newest_intact(self, template: Any, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Its run record; damaged ones are moved out of the way."""
        steps = self.steps()
        for step in reversed(steps):
            try:
                record = _read_record(self._path(step))
            except _Damaged as damage:
                damaged = self._set_aside(step)
                self._warn(
                    f"the checkpoint of step {step} is damaged ({damage}); it was moved to "
                    f"{damaged} and an older one is tried"
                )
            else:
                _check_format(self._path(step), record.get("format", 1))
                _check_identity(self._path(step), record["identity"], identity)
                _check_leaves(self._path(step), record["leaves"], template)
                return record
        if steps or any(self.directory.glob(f"*{DAMAGED}*")):
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} can be read. Restore one from a "
                f"backup, or start again in another --run-dir."
            )
        return None

    def _finish(self, step: int, response: Any, record: dict[str, Any]) -> None:
        """The part in the background: when all have written their shards, one publishes them."""
        response.result()
        if host.leads():
            self._publish(step, record)

    def _publish(self, step: int, record: dict[str, Any]) -> None:
        """Completes, makes durable, gives the checkpoint its name, drops the oldest."""
        partial, final = self._path(step, PARTIAL), self._path(step)
        (partial / _RUN).write_text(json.dumps(record))
        digests = {str(file.relative_to(partial)): _digest(file) for file in _files(partial)}
        (partial / _DIGESTS).write_text(json.dumps(digests))
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        if final.exists():
            _remove(final)
        partial.rename(final)
        _sync(self.directory)
        for old in self.steps()[: -self.keep]:
            _remove(self._path(old))

    def _succeeded(self, step: int, error: BaseException | None) -> bool:
        if error is None:
            return True
        # The half-written files go at once: on a full disk they are what keeps it full.
        self._sweep()
        steps = self.steps()
        last = f"the newest is that of step {steps[-1]}" if steps else "there is none so far"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        self._warn(
            f"the checkpoint of step {step} could not be saved in {self.directory} "
            f"({reason[:300]}); training goes on, {last}"
        )
        return False

    def _tidy(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def _sweep(self) -> None:
        """Deletes what is unfinished: ours, and what Orbax itself had under a name of its own."""
        for leftover in self.directory.glob(f"*{PARTIAL}*"):
            # A writer of the failed save may be at it still: the rest goes the next time.
            shutil.rmtree(leftover, ignore_errors=True)

    def _set_aside(self, step: int) -> Path:
        target = self._path(step, DAMAGED)
        if target.exists():
            shutil.rmtree(target)
        return self._path(step).rename(target)


def _named_leaves(tree: Any) -> dict[str, Any]:
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _signature(x: Any) -> str:
    return f"{jnp.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Forces a file, or the names in a directory, to the disk: power may fail after a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(checkpoint: Path) -> None:
    """Deletes a finished checkpoint; being killed half-way leaves nothing that looks finished."""
    doomed = checkpoint.rename(checkpoint.with_name(checkpoint.name + PARTIAL + "-deleted"))
    shutil.rmtree(doomed)


def _read_record(checkpoint: Path) -> dict[str, Any]:
    """The run record of a checkpoint whose files are what was written."""
    try:
        digests = json.loads((checkpoint / _DIGESTS).read_text())
        for name, digest in digests.items():
            if not (checkpoint / name).is_file():
                raise _Damaged(f"{name} is missing")
            if _digest(checkpoint / name) != digest:
                raise _Damaged(f"{name} is not what was written")
        return json.loads((checkpoint / _RUN).read_text())
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        raise _Damaged(f"{type(error).__name__}: {error}") from error


def _read_arrays(checkpoint: Path, template: Any) -> Any:
    wanted = _named_leaves(template)
    stored = {name: leaf for name, leaf in wanted.items() if leaf.size}
    try:
        arrays = ocp.load_checkpointables(checkpoint, {_ARRAYS: stored})[_ARRAYS]
    except Exception as error:
        # Its files are what was written: this is no damage that an older one could help with.
        raise CheckpointError(
            f"{checkpoint} is intact but cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    leaves = [
        arrays[name] if name in arrays else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        for name, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _check_format(checkpoint: Path, saved: int) -> None:
    if saved != FORMAT:
        age = "an older" if saved < FORMAT else "a newer"
        raise CheckpointError(
            f"{checkpoint} was made by {age} version of galore_jax, which keeps optimizer states "
            f"in format {saved}; this one reads format {FORMAT}. Finish the run with that version, "
            f"or start a new one in another --run-dir."
        )


def _check_identity(checkpoint: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    for field in wanted | saved:
        if saved.get(field) != wanted.get(field):
            raise CheckpointError(
                f"{field}: {checkpoint} was saved with {saved.get(field)!r}, this run has "
                f"{wanted.get(field)!r}. Resume with the saved value, or start the new one in "
                f"another --run-dir."
            )


def _check_leaves(checkpoint: Path, saved: dict[str, str], template: Any) -> None:
    wanted = {name: _signature(leaf) for name, leaf in _named_leaves(template).items()}
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{name}: {checkpoint} holds {saved.get(name, 'no such leaf')}, this run needs "
                f"{wanted.get(name, 'no such leaf')}. Some option changed the layout of the "
                f"training state: resume with the options of the run's config.json, or start in "
                f"another --run-dir."
            )
