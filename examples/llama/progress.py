"""What a person sees while a run goes on, and the numbers that it leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.progress
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

Row = dict[str, Any]


def perplexity(nats: float) -> float:
    """exp(nats), infinite where a float would overflow."""
    return math.exp(nats) if nats < 700 else math.inf


class Display:
    """A live line on a terminal; elsewhere (a file, a pipe) a plain line per update."""

    def __init__(self, steps: int, console: rich.console.Console):
        self.console = console
        self._steps = steps
        self._bar: rich.progress.Progress | None = None
        if console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed}/{task.total}"),
                rich.progress.BarColumn(),
                rich.progress.TextColumn("{task.description}"),
                console=console,
            )
            self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> Display:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, row: Row, *, seconds_left: float) -> None:
        """Shows the newest step."""
        status = (
            f"loss {row['loss']:.4f}  ppl {perplexity(row['loss']):.4g}  "
            f"lr {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} tokens/s  "
            f"{clock(seconds_left)} left"
        )
        if row["skipped"]:
            status += f"  {row['skipped']} non-finite steps skipped"
        if self._bar:
            self._bar.update(self._task, completed=row["step"], description=status)
        else:
            self.note(f"step {row['step']}/{self._steps}  {status}")

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that stays and is not overlooked."""
        self.console.print(
            f"WARNING: {text}", style="bold yellow", highlight=False, markup=False, soft_wrap=True
        )


def show_error(console: rich.console.Console, text: str) -> None:
    """The last line of a run that failed."""
    console.print(f"ERROR: {text}", style="bold red", highlight=False, markup=False)


def clock(seconds: float) -> str:
    """1:02:03, or 02:03 below an hour; a dash for what is not known."""
    if math.isnan(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute:02d}:{second:02d}"


@dataclasses.dataclass
class Stopwatch:
    """Speed of the training steps alone: compilation, evaluation and saving do not count.

    Args:
        tokens_per_step: what one step is worth.
        tokens: timed so far, by an earlier process too.
        seconds: that they took.
    """

    tokens_per_step: int
    tokens: int = 0
    seconds: float = 0.0
    _mark: tuple[int, float] | None = None

    def start(self, step: int) -> None:
        """The steps after this one are timed."""
        self._mark = step, time.perf_counter()

    def lap(self, step: int) -> float:
        """Books the steps up to this one; returns their tokens per second."""
        if self._mark is None or self._mark[0] == step:
            return self.rate
        tokens = (step - self._mark[0]) * self.tokens_per_step
        seconds = time.perf_counter() - self._mark[1]
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self.start(step)
        return tokens / seconds

    @property
    def rate(self) -> float:
        """Tokens per second over everything booked; 0 while nothing is."""
        return self.tokens / self.seconds if self.tokens else 0.0


class MetricsLog:
    """Rows of numbers in ``metrics.jsonl`` and the same for TensorBoard.

    Both are written from this thread: a writer that fails in another one (tensorboardX's default)
    would end in a deadlock on a full disk. A row that cannot be written is lost with a warning.

    Args:
        directory: of the run.
        last_step: rows of an earlier process past this step are dropped, they will come again.
        warn: is told, in one sentence, of a row that could not be written.
    """

    def __init__(self, directory: Path, *, last_step: int, warn: Callable[[str], None]):
        self._path = directory / "metrics.jsonl"
        self._warn = warn
        _keep_rows(self._path, last_step)
        (directory / "tensorboard").mkdir(exist_ok=True)
        # The process id tells files of one second apart.
        self._events = EventsWriter(str(directory / "tensorboard" / "events"), f".{os.getpid()}")
        if last_step:
            # Makes TensorBoard forget what an earlier process wrote past this step.
            restart = SessionLog(status=SessionLog.START)
            self._events.write_event(
                Event(step=last_step + 1, wall_time=time.time(), session_log=restart)
            )

    def write(self, rows: Sequence[Row]) -> None:
        """Appends the rows; each has a `step`, and numbers under names of their own.

        Of a list TensorBoard gets the mean; a name in a group is "group/name" there.
        """
        try:
            with self._path.open("a") as file:
                file.writelines(json.dumps(_finite(row)) + "\n" for row in rows)
            for row in rows:
                for name, value in _scalars(row):
                    self._events.write_event(
                        Event(step=row["step"], wall_time=time.time(), summary=scalar(name, value))
                    )
            self._events.flush()
        except OSError as error:
            self._warn(f"numbers could not be written to {self._path.parent}: {error}")

    def close(self) -> None:
        """Finishes the TensorBoard file."""
        try:
            self._events.close()
        except OSError as error:
            self._warn(f"{self._path.parent / 'tensorboard'} could not be finished: {error}")


class NoLog:
    """What a process writes whose numbers are written by another one."""

    def write(self, rows: Sequence[Row]) -> None:
        del rows

    def close(self) -> None:
        pass


def read_metrics(path: Path) -> list[Row]:
    """The rows of a ``metrics.jsonl``; a line that a crash or a full disk cut short is left out."""
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _keep_rows(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= last_step]
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(json.dumps(row) + "\n" for row in kept))
    replacement.rename(path)


def _scalars(row: Row, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Everything in a row but its step, as one number each."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            known = [x for x in value if x is not None]
            if known:
                yield prefix + name, sum(known) / len(known)
        elif prefix + name != "step":
            yield prefix + name, value


def _finite(value: Any) -> Any:
    """NaN and infinity are no JSON: they are written as null."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
