"""Processes that end when nobody expects it, or are one too many."""

import random
import signal
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.faults.ground import LOST_AT_MOST, Fault, Ground, Outcome
from benchmarks.faults.runs import SAVE_EVERY, VARIANTS, finish, insist, insist_same, wait_for
from examples.llama import train


def kill(ground: Ground) -> Iterator[Fault]:
    """SIGKILL at random moments, from the start of the process on."""
    share, more = divmod(ground.kills, len(VARIANTS))
    for number, (name, options) in enumerate(VARIANTS.items()):
        times = share + (number < more)
        yield Fault(name, lambda o=options, t=times: _killed(ground, o, t), times)


def _killed(ground: Ground, options: dict[str, Any], times: int) -> Outcome:
    options = options | ground.long
    reference, run = ground.reference(options), ground.run(options)
    moments = random.Random(times)
    counts = dict.fromkeys(("starting", "saving", "between saves"), 0)
    worst = 0
    for number in range(times):
        logged, saved = run.logged, run.saved
        process = run.start("--resume")
        if number % 3 == 2:
            time.sleep(moments.uniform(0.0, 6.0))
        else:
            wait_for(run, min(logged + 1, options["steps"] - SAVE_EVERY), process)
            time.sleep(moments.uniform(0.0, 0.3))
        process.kill()
        process.wait()
        insist(run.saved >= saved, f"the checkpoint of step {saved} is gone")
        lost = run.logged - run.saved
        insist(lost <= LOST_AT_MOST, f"{lost} steps were lost")
        worst = max(worst, lost)
        partial = any(run.checkpoints.glob("*.partial*"))
        moved = run.logged != logged or run.saved != saved
        counts["saving" if partial else "between saves" if moved else "starting"] += 1
    said = finish(run)
    insist("damaged" not in run.said() + said, "a kill damaged a finished checkpoint")
    insist_same(run, reference)
    return Outcome(times, worst, ", ".join(f"{n} {what}" for what, n in counts.items() if n))


def stop(ground: Ground) -> Iterator[Fault]:
    """SIGTERM, Ctrl-C, and Ctrl-C twice."""
    for name, options in VARIANTS.items():
        for number in (signal.SIGTERM, signal.SIGINT):
            fault = f"{number.name}, {name}"
            yield Fault(fault, lambda o=options, n=number: _stopped(ground, o, n))
    yield Fault("SIGINT twice, plain", lambda: _stopped_twice(ground, VARIANTS["plain"]))


def _stopped(ground: Ground, options: dict[str, Any], number: signal.Signals) -> Outcome:
    options = options | ground.long
    reference, run = ground.reference(options), ground.run(options)
    process = run.start()
    wait_for(run, 7, process)
    process.send_signal(number)
    status = process.wait(120)
    insist(status == 128 + number, f"ended with status {status}")
    insist(run.saved == run.logged < options["steps"], f"step {run.logged}, saved {run.saved}")
    insist("--resume" in run.said(), "did not say how to go on")
    lost, stopped_at = run.logged - run.saved, run.saved
    finish(run)
    insist_same(run, reference)
    return Outcome(lost=lost, seen=f"saved step {stopped_at} and ended")


def _stopped_twice(ground: Ground, options: dict[str, Any]) -> Outcome:
    options = options | ground.long
    reference, run = ground.reference(options), ground.run(options)
    process = run.start()
    wait_for(run, 7, process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    status = process.wait(120)
    insist(status != train.FINISHED, "went on")
    lost = run.logged - run.saved
    insist(lost <= LOST_AT_MOST, f"{lost} steps were lost")
    finish(run)
    insist_same(run, reference)
    return Outcome(lost=lost, seen=f"ended with status {status}")


def intruder(ground: Ground) -> Iterator[Fault]:
    """A second process in the directory of a run that is going on."""
    yield Fault("with --resume", lambda: _intruded(ground, "--resume"))
    yield Fault("without", lambda: _intruded(ground))


def _intruded(ground: Ground, *more: str) -> Outcome:
    options = VARIANTS["plain"] | ground.long
    reference, run = ground.reference(options), ground.run(options)
    process = run.start()
    wait_for(run, 1, process)
    status, said = run.call(*more)
    insist(process.poll() is None, "the first one had ended already")
    insist(status == train.FAILED, f"ended with status {status}")
    wanted = "another process is training" if more else "is not empty"
    insist(wanted in said, said[-300:])
    insist(process.wait(120) == train.FINISHED, "disturbed the first one")
    insist_same(run, reference)
    return Outcome(seen="refused, the first one undisturbed")
