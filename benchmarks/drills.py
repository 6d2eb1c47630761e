"""Faults that a training run has to survive: how often it did, and what was lost at most.

    python -m benchmarks.drills [--kills 51] [--only kill disk]

Every drill ends with a run that equals one that nothing happened to, bit for bit, or with a refusal
that says what is wrong and leaves everything as it was. Steps that are lost are done again.
"""

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import report
from benchmarks.faults import DRILLS
from benchmarks.faults.ground import Fault, Ground, ImpossibleError, Outcome
from benchmarks.faults.runs import DrillError, compiled_once


class Line(NamedTuple):
    """Of the tally: a fault of a drill, tried some times."""

    drill: str
    fault: str
    times: int
    survived: int
    lost: int
    seen: str


def main(argv: Sequence[str] | None = None) -> int:
    """Command line program; its exit status is 1 if anything was not survived."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=51, help="shared by three kinds of runs")
    parser.add_argument("--only", nargs="+", default=list(DRILLS), choices=list(DRILLS))
    parser.add_argument("--out", type=Path, help="where runs are kept; else they are deleted")
    options = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        directory = options.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(compiled_once(directory.absolute() / "compiled"))
        ground = Ground(directory.absolute(), options.kills)
        lines = [line for name in options.only for line in held(name, ground)]
    tally = list(summed(lines))
    report.publish(
        "Faults of a training run: what was survived, and how many steps had to be done again",
        [line._asdict() for line in tally],
        "drills",
    )
    return int(any(line.survived < line.times for line in tally))


def held(name: str, ground: Ground) -> Iterator[Line]:
    """The lines of one drill, said aloud as they come."""
    for fault in DRILLS[name](ground):
        began = time.monotonic()
        outcome, problem = attempt(fault)
        survived = 0 if problem else outcome.times
        line = Line(name, fault.name, fault.times, survived, outcome.lost, problem or outcome.seen)
        print(f"{time.monotonic() - began:6.1f} s", *line, sep=" | ", file=sys.stderr, flush=True)
        yield line


def attempt(fault: Fault) -> tuple[Outcome, str]:
    """What became of a fault, and the problem if it was not survived."""
    try:
        return fault.attempt(), ""
    except ImpossibleError as error:
        return Outcome(0), f"not tried: {error}"
    except (DrillError, OSError, ValueError, KeyError) as error:
        return Outcome(0), f"{type(error).__name__}: {error}"


def summed(lines: Iterable[Line]) -> Iterator[Line]:
    """One line for each fault that was tried several times with the same outcome in words."""
    for (drill, fault, seen), group in itertools.groupby(
        lines, lambda x: (x.drill, x.fault, x.seen)
    ):
        same = list(group)
        yield Line(
            drill,
            fault,
            sum(line.times for line in same),
            sum(line.survived for line in same),
            max(line.lost for line in same),
            seen,
        )


if __name__ == "__main__":
    sys.exit(main())
