"""What a drill is made of: a place, faults, what becomes of them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults.runs import SAVE_EVERY, VARIANTS, Run, finish, write_corpus

# One that is under way when the next is begun is waited for, so two may be missing.
LOST_AT_MOST = 2 * SAVE_EVERY


class Outcome(NamedTuple):
    """What became of a fault.

    Args:
      times: It was tried.
      lost: Steps that had to be done again, at most.
      seen: What happened, in a few words.
    """

    times: int = 1
    lost: int = 0
    seen: str = ""


class Fault(NamedTuple):
    """Something that goes wrong, and the run that it goes wrong in.

    Args:
      name: Of the fault.
      attempt: Raises `DrillError` if the run does not survive it.
      times: How often it is tried.
    """

    name: str
    attempt: Callable[[], Outcome]
    times: int = 1


class ImpossibleError(Exception):
    """The drill cannot be held on this machine."""


class Ground:
    """Where drills are held: a corpus, and undisturbed runs to compare with.

    Args:
      directory: Everything is below it.
      kills: How many are shared by the variants.
      steps: Of a run that something happens to on its way; a save is under way most of the time.
    """

    def __init__(self, directory: Path, kills: int = len(VARIANTS), steps: int = 240):
        self.directory = directory
        self.kills = kills
        self.long = {"steps": steps, "eval-every": steps // 2}
        self.corpus = write_corpus(directory / "corpus")
        self._references: dict[str, Run] = {}
        self._runs = 0

    def run(self, options: dict[str, Any]) -> Run:
        """A new run, not begun."""
        self._runs += 1
        return Run(self.directory / f"run_{self._runs:03d}", self.corpus, options)

    def reference(self, options: dict[str, Any]) -> Run:
        """A finished run that nothing happened to."""
        known = repr(options)
        if known not in self._references:
            run = self.run(options)
            finish(run)
            self._references[known] = run
        return self._references[known]

    def copy(self, run: Run) -> Run:
        """The same in a directory of its own."""
        copied = self.run(dict(run.options))
        shutil.copytree(run.directory, copied.directory)
        return copied
