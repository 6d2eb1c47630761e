"""Faults that a training run has to survive: how often it did, and what was lost at most.

    python -m benchmarks.drills [--kills 51] [--only kill disk]

Every drill ends with a run that equals one that nothing happened to, bit for bit, or with a refusal
that says what is wrong and leaves everything as it was. Steps that are lost are done again.
"""

import argparse
import contextlib
import itertools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import report
from benchmarks.faults import DRILLS
from benchmarks.faults.ground import Fault, Ground, ImpossibleError, Outcome
from benchmarks.faults.runs import compiled_once

TITLE = "Faults of a training run: what was survived, and how many steps had to be done again"


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
    logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # it warns of each NaN
    with contextlib.ExitStack() as stack:
        directory = options.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(compiled_once(directory.absolute() / "compiled"))
        ground = Ground(directory.absolute(), options.kills)
        lines = [line for name in options.only for line in held(name, ground)]
    tally = list(summed(lines))
    rows = with_earlier(tally)
    title = (
        TITLE if len(rows) == len(tally) else f"{TITLE} (what was not held this time: as before)"
    )
    report.publish(title, [line._asdict() for line in rows], "drills")
    return int(any(line.survived < line.times for line in tally))


def held(name: str, ground: Ground) -> Iterator[Line]:
    """The lines of one drill, said aloud as they come."""
    for fault in DRILLS[name](ground):
        began = time.monotonic()
        outcome, problem = attempt(fault)
        times, survived = (fault.times, 0) if problem else (outcome.times, outcome.times)
        line = Line(name, fault.name, times, survived, outcome.lost, problem or outcome.seen)
        print(f"{time.monotonic() - began:6.1f} s", *line, sep=" | ", file=sys.stderr, flush=True)
        yield line


def attempt(fault: Fault) -> tuple[Outcome, str]:
    """What became of a fault, and the problem if it was not survived."""
    try:
        return fault.attempt(), ""
    except ImpossibleError as error:
        return Outcome(times=0, seen=f"not tried: {error}"), ""
    except Exception as error:  # whatever it is, the drill was not survived
        return Outcome(times=0), f"{type(error).__name__}: {error}"


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


def with_earlier(tally: Sequence[Line]) -> list[Line]:
    """The tally, with the last lines of the drills that were not held this time."""
    file = report.results_directory() / "drills.json"
    earlier = json.loads(file.read_text())["rows"] if file.exists() else []
    held = {line.drill for line in tally}
    lines = [*tally, *(Line(**row) for row in earlier if row["drill"] not in held)]
    return sorted(lines, key=lambda line: list(DRILLS).index(line.drill))


if __name__ == "__main__":
    sys.exit(main())
