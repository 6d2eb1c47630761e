"""Batches whose loss is no number, and batches without any gradient."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.faults.ground import Fault, Ground, Outcome
from benchmarks.faults.runs import VARIANTS, Run, batches, insist, insist_same_arrays
from examples.llama import train

STEPS, GAP = 8, 3
# Every state is kept. Nearest rounding: the random one depends on the step, and steps shift here.
_WATCHED = {
    "steps": STEPS,
    "save-every": 1,
    "keep": 20,
    "gap": GAP,
    "refresh": "every",
    "rounding": "nearest",
}
WAYS = VARIANTS | {"full gradients": VARIANTS["plain"] | {"backward": "full"}}
# Numbers of batches, from 1: the first makes the first bases, the fourth the second ones.
FIRST, ON_A_REFRESH, BETWEEN = 1, 1 + GAP, 3
# What a step counts, whatever became of it.
_COUNTERS = ("step", "total_notfinite", "notfinite_count", "last_finite")


def no_number(ground: Ground) -> Iterator[Fault]:
    """A batch with a loss that is no number costs exactly this batch."""
    for way, options in WAYS.items():
        for value in (math.nan, math.inf):
            for bad in (FIRST, ON_A_REFRESH, BETWEEN):
                fault = f"{value}, {way}"
                yield Fault(fault, lambda o=options, b=bad, v=value: _skipped(ground, o, b, v))


def _skipped(ground: Ground, options: dict[str, Any], bad: int, value: float) -> Outcome:
    run = _trained(ground, options, {bad: value})
    losses = [row["loss"] for row in run.rows() if "loss" in row]
    insist([loss is None for loss in losses] == _only(bad), f"losses {losses}")
    counted = [row["bad_in_a_row"] for row in run.rows() if "loss" in row]
    insist(counted == [int(one) for one in _only(bad)], f"counted {counted}")
    without = _trained(ground, options, {}, leave_out=(bad,))
    insist_same_arrays(_but_for_counters(run, STEPS), _but_for_counters(without, STEPS - 1))
    return Outcome(lost=1, seen="counted; the rest as if the batch had not been there")


def zeros(ground: Ground) -> Iterator[Fault]:
    """A gradient of zeros makes no basis; the refresh comes a step later."""
    for way, options in WAYS.items():
        for bad in (FIRST, ON_A_REFRESH):
            yield Fault(way, lambda o=options, b=bad: _no_basis(ground, o, b))


def _no_basis(ground: Ground, options: dict[str, Any], bad: int) -> Outcome:
    run = _trained(ground, options, {bad: 0.0})
    states = {step: run.arrays(step) for step in range(1, STEPS + 1)}
    for step, state in states.items():
        for name, leaf in state.items():
            insist(np.isfinite(leaf.astype(np.float32)).all(), f"step {step}: {name}")
    counted = {step: _refreshes(state) for step, state in states.items()}
    insist(counted[STEPS].min() > 0, "no refreshes are counted")
    rises = [int(np.min(counted[step] - counted.get(step - 1, 0))) for step in states]
    expected = [1 if step in _refresh_steps(bad) else 0 for step in states]
    insist(rises == expected, f"refreshes in steps {rises}, not {expected}")
    if bad > 1:
        before, after = states[bad - 1], states[bad]
        bases = [name for name in after if "projectors/" in name]
        insist(bases, "no bases are saved")
        insist_same_arrays({n: after[n] for n in bases}, {n: before[n] for n in bases})
    return Outcome(seen="bases stay, the refresh comes a step later")


def _refresh_steps(bad: int) -> set[int]:
    return {bad + 1 if step == bad else step for step in range(1, STEPS + 1, GAP)}


def _refreshes(state: dict[str, np.ndarray]) -> np.ndarray:
    """How often each basis of the model's matrices has been computed."""
    counts = [x for name, x in state.items() if "/refreshes/" in name and "kernel" in name]
    return np.concatenate([np.ravel(x) for x in counts if x.ndim])


def _trained(
    ground: Ground, options: dict[str, Any], weights: dict[int, float], leave_out: Any = ()
) -> Run:
    run = ground.run(options | _WATCHED)
    with batches(weights, leave_out=leave_out):
        status, said = run.call()
    insist(status == train.FINISHED, f"status {status}: {said[-300:]}")
    return run


def _only(bad: int) -> list[bool]:
    return [step == bad for step in range(1, STEPS + 1)]


def _but_for_counters(run: Run, step: int) -> dict[str, np.ndarray]:
    leaves = run.arrays(step).items()
    return {name: x for name, x in leaves if name.rpartition("/")[2] not in _COUNTERS}
