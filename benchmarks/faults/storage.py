"""Disks that are full, files that are not what was written."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.faults.ground import (
    LOST_AT_MOST,
    Fault,
    Ground,
    ImpossibleError,
    Outcome,
)
from benchmarks.faults.runs import (
    SAVE_EVERY,
    VARIANTS,
    Run,
    finish,
    insist,
    insist_same,
    wait_for,
)
from examples.llama import train


def disk(ground: Ground) -> Iterator[Fault]:
    """A file system that fills up in the middle of a run, and has room again later."""
    yield Fault("no room left, then room again", lambda: _full(ground))


def _full(ground: Ground) -> Outcome:
    options = VARIANTS["plain"] | ground.long
    reference = ground.reference(options)
    with _small_disk(ground.directory / "disk") as place:
        filler, heard = place / "filler", ground.directory / "disk.output"
        run = Run(place / "run", ground.corpus, options, output=heard)
        process = run.start()
        wait_for(run, 12, process)
        end = time.monotonic() + 120
        while process.poll() is None:
            _fill(filler)
            insist(time.monotonic() < end, "hangs")
            time.sleep(0.02)
        insist(process.returncode == train.FAILED, f"ended with status {process.returncode}")
        insist("could not be saved" in run.said(), "did not say that nothing was saved")
        saved = run.saved
        insist(saved >= 12 - LOST_AT_MOST, f"the newest checkpoint is that of step {saved}")
        _fill(filler)
        status = run.start("--resume").wait(120)
        insist(status == train.FAILED, f"on a full disk, resuming ended with status {status}")
        insist("No space left" in run.said(), "did not say that the disk is full")
        insist(run.saved == saved, "a checkpoint is gone")
        filler.unlink()
        finish(run)
        insist_same(run, reference)
    return Outcome(
        lost=options["steps"] - saved, seen=f"warned at each save; {saved} steps were kept"
    )


@contextlib.contextmanager
def _small_disk(place: Path) -> Iterator[Path]:
    place.mkdir()
    if os.geteuid() or not shutil.which("mount"):
        raise ImpossibleError("needs the right to mount a tmpfs")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]).returncode:
        raise ImpossibleError("needs the right to mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _fill(filler: Path) -> None:
    """Takes whatever room there is."""
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def damage(ground: Ground) -> Iterator[Fault]:
    """A bit of each file of the newest checkpoint flipped, half of it gone, all of it gone."""
    reference = ground.reference(VARIANTS["plain"])
    files = sorted(path for path in reference.newest.rglob("*") if path.is_file())
    for harm in (flip_a_bit, truncate, os.remove):
        fault = f"{harm.__name__.replace('_', ' ')}, each file in turn"
        for path in files:
            inside = path.relative_to(reference.directory)
            yield Fault(fault, lambda h=harm, i=inside: _damaged(ground, reference, h, i))
    yield Fault("both checkpoints damaged", lambda: _all_damaged(ground, reference))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _damaged(ground: Ground, reference: Run, harm: Callable[[Path], None], inside: Path) -> Outcome:
    run = ground.copy(reference)
    before, victim = run.saved, run.directory / inside
    content = victim.read_bytes()
    harm(victim)
    harmless = victim.exists() and victim.read_bytes() == content
    status, said = run.call("--resume")
    insist(status == train.FINISHED, f"{inside}: status {status}: {said[-300:]}")
    noticed = f"step {before} is damaged" in said
    insist(noticed or harmless, f"{inside}: not noticed")
    insist_same(run, reference)
    shutil.rmtree(run.directory)
    return Outcome(lost=SAVE_EVERY * noticed, seen="the one before was taken, aloud")


def _all_damaged(ground: Ground, reference: Run) -> Outcome:
    run = ground.copy(reference)
    for record in run.checkpoints.glob("*/run.json"):
        flip_a_bit(record)
    log = run.rows()
    for _ in range(2):  # it does not start from scratch the second time either
        status, said = run.call("--resume")
        insist(status == train.FAILED, f"status {status}")
        insist("none of the checkpoints" in said, said[-300:])
    insist(run.rows() == log, "the log was changed")
    return Outcome(lost=run.logged, seen="refused, everything kept for a post-mortem")
