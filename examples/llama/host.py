"""What a run asks of its machine: a directory, signals, its place among the processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax


class StopSignal:
    """Remembers the first SIGINT or SIGTERM; the second one acts as it would have anyway."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()


@contextlib.contextmanager
def claimed(run_dir: Path, *, resume: bool) -> Iterator[None]:
    """Makes sure that a run neither overwrites an earlier one nor shares its directory.

    Raises:
        ValueError: there is a run already, or another process is at it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    if not resume and any(run_dir.iterdir()):
        raise ValueError(
            f"{run_dir} is not empty: add --resume to go on with the run in it, or choose another "
            f"--run-dir"
        )
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        # The lock is on the directory itself and goes with the process, however that ends.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"another process is training in {run_dir}") from None
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes the whole file or nothing."""
    replacement = path.with_suffix(".tmp")
    replacement.write_text(json.dumps(value, indent=2) + "\n")
    replacement.rename(path)


def this_process() -> tuple[int, int]:
    """Index of this process and number of them: the one place that asks."""
    return jax.process_index(), jax.process_count()
