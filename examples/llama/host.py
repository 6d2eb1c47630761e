"""What a run asks of its machines: a directory, signals, its place among the processes."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from examples.llama.optimizers import default

T = TypeVar("T")

SHUTDOWN_SECONDS = 30  # how long a process that is done, or has failed, waits for the others


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """Where a run takes place. Not part of what it is: given anew at every start and --resume."""

    mesh: Annotated[str | None, default("one device; with --distributed data=ALL")] = None
    """Axes with sizes that multiply to all devices, as data=2,fsdp=2,tensor=2; see the README."""
    cpu_devices: Annotated[int | None, default("what JAX finds")] = None
    """Simulate so many devices on the CPU, in this process."""
    distributed: bool = False
    """This process is one of several; Slurm, Open MPI, TPU pods and GKE tell JAX which."""
    coordinator: Annotated[str | None, default("detected")] = None
    """HOST:PORT of process 0, for all processes the same."""
    num_processes: Annotated[int | None, default("detected")] = None
    """How many processes there are."""
    process_id: Annotated[int | None, default("detected")] = None
    """Which of them this is, from 0."""


class LeaderError(RuntimeError):
    """Process 0 could not do something that all processes need."""


def connect(options: DeviceOptions) -> None:
    """Makes the devices available; must come before anything asks for one.

    Raises:
        ValueError: options without effect, or too few to find the other processes.
    """
    given = {
        "--coordinator": options.coordinator,
        "--num-processes": options.num_processes,
        "--process-id": options.process_id,
    }
    idle = [flag for flag, value in given.items() if value is not None]
    if idle and not options.distributed:
        raise ValueError(f"{', '.join(idle)}: no effect without --distributed")
    if options.cpu_devices is not None:
        if options.cpu_devices < 1:
            raise ValueError(f"--cpu-devices {options.cpu_devices}: must be at least 1")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    if not options.distributed:
        return
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.num_processes,
            options.process_id,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed: {error} Where JAX cannot find out by itself, give --coordinator "
            f"HOST:PORT, --num-processes N and --process-id I."
        ) from error


def disconnect() -> None:
    """Waits for the other processes to end as well; one that does not is given up on, aloud."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


@contextlib.contextmanager
def ends_at_once(
    status: int, report: Callable[[str], None], *, unless: tuple[type[Exception], ...]
) -> Iterator[None]:
    """Inside, a process that fails does not wait for the others, nor do they wait for it for ever.

    It says why and exits. JAX ends the others: when their next exchange with it fails, or else when
    its heartbeats are missed, after 100 seconds. With one process this does nothing.

    Args:
        status: to exit with.
        report: is told why.
        unless: exceptions that all processes raise alike; they pass.
    """
    try:
        yield
    except unless:
        raise
    except Exception as error:
        if jax.process_count() == 1 or os.environ.get("TRACEBACK"):
            raise
        report(
            f"{name()} {type(error).__name__}: {error}\n(this ends all processes; if another one "
            f"ended first, the reason is there. Start all of them again with --resume)"
        )
        sys.stdout.flush()
        os._exit(status)


def name() -> str:
    """What to call this process in a message; nothing if it is the only one."""
    return f"process {jax.process_index()}:" if jax.distributed.is_initialized() else ""


def leads() -> bool:
    """Whether this is the one process that prints and writes what all of them know."""
    return jax.process_index() == 0


def from_leader(decide: Callable[[], T]) -> T:
    """The result of `decide` on process 0, on all of them; it runs nowhere else.

    All processes have to call this at the same point of the program.

    Args:
        decide: returns a JSON value.

    Raises:
        LeaderError: `decide` failed; process 0 itself gets the exception as it was.
    """
    if jax.process_count() == 1:
        return decide()
    failure, outcome = None, {}
    if leads():
        try:
            outcome = {"value": decide()}
        except Exception as error:
            failure, outcome = error, {"error": str(error)}
    outcome = json.loads(_broadcast(json.dumps(outcome).encode()))
    if failure:
        raise failure
    if "error" in outcome:
        raise LeaderError(f"process 0 stopped all of them: {outcome['error']}")
    return outcome["value"]


def _broadcast(message: bytes) -> bytes:
    """The message of process 0."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    own = np.frombuffer(message[:size].ljust(size), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own)).tobytes()


class Agreement:
    """Lets all processes act on what only one of them knows, without waiting for each other.

    The k-th call returns the largest number that any process gave in its call k - 1: that one has
    crossed the network while the devices were busy. One process alone is answered at once.
    """

    def __init__(self) -> None:
        self._under_way: jax.Array | None = None

    def __call__(self, number: int) -> int:
        if jax.process_count() == 1:
            return number
        former, self._under_way = self._under_way, _largest(number)
        return 0 if former is None else int(former)


def _largest(number: int) -> jax.Array:
    mesh, largest = _reduction()
    one_each = jax.make_array_from_callback(
        (mesh.size,),
        NamedSharding(mesh, PartitionSpec("all")),
        lambda _: np.full(1, number, np.int32),
    )
    return largest(one_each)


@functools.cache
def _reduction() -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
    mesh = Mesh(np.asarray(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
    return mesh, jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))


class StopSignal:
    """Remembers the first SIGINT or SIGTERM; the second one acts as it would have anyway.

    `received` is what this process heard, `agreed` what all of them act on.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.agreed: int | None = None
        self._agreement = Agreement()
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def reached(self) -> bool:
        """Whether to stop now: the same on all processes, which call this once in every step."""
        self.agreed = self._agreement(self.received or 0) or None
        return self.agreed is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()


@contextlib.contextmanager
def claimed(run_dir: Path, *, resume: bool) -> Iterator[None]:
    """Makes sure that a run neither overwrites an earlier one nor shares its directory.

    Raises:
        ValueError: there is a run already, or another process is at it.
        LeaderError: the same, as other processes than the first see it.
    """
    from_leader(lambda: _make_directory(run_dir, resume))
    # The lock is on the directory itself and goes with the process, however that ends.
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        # Alone, then all together: a straggler of a run that was killed keeps the next one out.
        from_leader(lambda: _lock(run_dir, descriptor, fcntl.LOCK_EX, fcntl.LOCK_SH))
        _lock(run_dir, descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _make_directory(run_dir: Path, resume: bool) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    if not resume and any(run_dir.iterdir()):
        raise ValueError(
            f"{run_dir} is not empty: add --resume to go on with the run in it, or choose another "
            f"--run-dir"
        )


def _lock(run_dir: Path, descriptor: int, *kinds: int) -> None:
    try:
        for kind in kinds:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is training in {run_dir}") from None


def write_json(path: Path, value: Any) -> None:
    """Writes the whole file or nothing."""
    replacement = path.with_suffix(".tmp")
    replacement.write_text(json.dumps(value, indent=2) + "\n")
    replacement.rename(path)
