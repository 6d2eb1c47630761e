"""Trains a Llama: ``python -m examples.llama.train --help``.

The story of a run is told by `train`, from the corpus to the closing table; what happens in one
step is in `step.py`, what survives a crash in `checkpoint.py`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
import rich.console

import galore_jax as gj
from examples.llama import (
    checkpoint,
    config,
    host,
    mesh,
    model,
    optimizers,
    progress,
    report,
    step,
    subspace,
)
from examples.llama.task import Task, make_task

ROUNDING = 1  # folded into the seed's key
FINISHED, FAILED, GAVE_UP = 0, 1, 3  # 2 is argparse's; a signal exits with 128 + its number
REFUSALS = (ValueError, ImportError, OSError, checkpoint.CheckpointError, host.LeaderError)


class GiveUpError(RuntimeError):
    """Too many steps in a row were not finite."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line program; returns its exit status."""
    console = rich.console.Console()
    # What Orbax logs as an error it raises as well, and we say it in one sentence.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        options = config.parse(argv)
        settings = config.resolve(options)
        host.connect(settings.devices)
        check_alike(settings)
        with host.claimed(settings.run.run_dir, resume=settings.run.resume):
            status, reason = train(options, settings, console), None
    except GiveUpError as error:
        status, reason = GAVE_UP, str(error)
    except REFUSALS as error:
        if os.environ.get("TRACEBACK"):
            raise
        status, reason = FAILED, f"{error}\n(set TRACEBACK=1 to see where it came from)"
    if reason:
        progress.show_error(console, f"{host.name()} {reason}".strip())
    host.disconnect()
    return status


def check_alike(settings: config.TrainConfig) -> None:
    """Raises unless all processes were given the same options; else they would part unnoticed."""
    own = {
        f"--{name.replace('_', '-')}": value
        for group in config.to_json(settings).values()
        for name, value in group.items()
        if name not in ("run_dir", "cache_dir", "paths")  # what a machine may call differently
    } | {"--mesh": settings.devices.mesh}
    leader = host.from_leader(lambda: own)
    for flag, value in own.items():
        if leader[flag] != value:
            raise ValueError(
                f"{flag} is {value!r} here and {leader[flag]!r} in process 0: start all processes "
                f"with the same options"
            )


def train(
    options: config.TrainConfig, settings: config.TrainConfig, console: rich.console.Console
) -> int:
    """One run from its start or restart to its report.

    Args:
        options: as given, for the record.
        settings: the same with every None replaced.
        console: where to show what happens.

    Returns:
        The exit status.
    """
    display = progress.Display(
        settings.schedule.steps, console if host.leads() else rich.console.Console(quiet=True)
    )
    task = make_task(settings)
    run_dir = settings.run.run_dir
    display.note(f"corpus     {task.corpus.description}")
    display.note(f"model      {settings.model.preset}, {model.num_params(task.llama):,} parameters")
    display.note(f"optimizer  {optimizers.describe(settings.optimizer)}")
    size = report.bytes_text(mesh.bytes_per_device(task.template))
    display.note(f"devices    {task.devices}; {size} of training state on each")
    display.note(f"run        {run_dir}")

    checkpoints = checkpoint.Checkpoints(
        run_dir / "checkpoints", keep=settings.run.keep, warn=display.warn
    )
    alike = (GiveUpError, checkpoint.CheckpointError, host.LeaderError)
    failing = functools.partial(progress.show_error, console)
    with contextlib.closing(checkpoints), host.ends_at_once(FAILED, failing, unless=alike):
        start = restore_or_init(task, checkpoints, display)
        log = open_log(options, run_dir, start, display) if host.leads() else progress.NoLog()
        with contextlib.closing(log), display, host.StopSignal() as stop:
            end = fit(task, start, checkpoints, log, display, stop)
        saved = checkpoints.wait()

        if stop.agreed:
            return pause(stop.agreed, task, end, saved, display)
        host.from_leader(lambda: finish(task, end, display))
        return FINISHED if saved else FAILED


class Progress(NamedTuple):
    """How far a run has come; saved with every checkpoint.

    Args:
        step: steps done.
        tokens: trained on.
        elapsed: seconds, over all processes of the run.
        timed_tokens: those whose time is in `timed_seconds`: without compilation and evaluation.
        timed_seconds: see `timed_tokens`.
        data: position of the data iterator.
    """

    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0
    timed_tokens: int = 0
    timed_seconds: float = 0.0
    data: Any = None


class Done(NamedTuple):
    """A step that is not in the log yet.

    Args:
        progress: after it.
        metrics: its numbers.
        subspaces: what `gj.metrics` said after it; nothing on most steps.
    """

    progress: Progress
    metrics: step.Metrics
    subspaces: dict[str, gj.SubspaceMetrics]


class Position(NamedTuple):
    """A point of the run from which it can go on."""

    state: step.TrainState
    progress: Progress


def restore_or_init(
    task: Task, checkpoints: checkpoint.Checkpoints, display: progress.Display
) -> Position:
    """The newest intact checkpoint, or the beginning."""
    identity = config.identity(task.settings, task.corpus.fingerprint)
    restored = checkpoints.restore(task.template, identity)
    if restored:
        state, record = restored
        display.note(f"resumed    at step {record['step']}")
        return Position(state, Progress(**record["progress"]))
    if task.settings.run.resume:
        display.warn(f"no checkpoint in {checkpoints.directory}: starting from step 0")
    return Position(task.new_state(), Progress())


def open_log(
    options: config.TrainConfig, run_dir: Path, start: Position, display: progress.Display
) -> progress.MetricsLog:
    """Records the options; what is logged from here on follows the start."""
    host.write_json(run_dir / "config.json", config.to_json(options))
    return progress.MetricsLog(run_dir, last_step=start.progress.step, warn=display.warn)


def fit(
    task: Task,
    start: Position,
    checkpoints: checkpoint.Checkpoints,
    log: progress.MetricsLog | progress.NoLog,
    display: progress.Display,
    stop: host.StopSignal,
) -> Position:
    """Trains until the last step or a signal; numbers are written and the end is saved.

    Raises:
        GiveUpError: too many steps in a row were not finite.
    """
    settings, steps = task.settings, task.settings.schedule.steps
    # Not the key that the parameters were drawn with.
    rounding_key = jax.random.fold_in(jax.random.key(settings.run.seed), ROUNDING)
    stochastic = settings.schedule.rounding == "stochastic"
    train_step = task.train_step(rounding_key if stochastic else None)
    eval_step = step.make_eval_step(task.loss_fn)
    batches = task.training(start.progress.data)
    tokens_per_step = settings.data.batch_size * settings.data.seq_len
    watch = progress.Stopwatch(
        tokens_per_step, start.progress.timed_tokens, start.progress.timed_seconds
    )
    began = time.monotonic() - start.progress.elapsed
    state, done = start
    diagnose = step.make_diagnosis(task.state_sharding)
    unlogged: list[Done] = []

    for number in range(done.step + 1, steps + 1):
        state, metrics = train_step(state, next(batches))
        done = done._replace(step=number, tokens=done.tokens + tokens_per_step)
        looking = settings.run.diagnostics_every and number % settings.run.diagnostics_every == 0
        subspaces = diagnose(state.opt_state) if looking else {}
        unlogged.append(Done(done, metrics, subspaces))
        if number == start.progress.step + 1:
            jax.block_until_ready(metrics)  # compilation is over: from here on time counts
            watch.start(number)

        stopping = stop.reached()
        evaluating = number == steps or number % settings.run.eval_every == 0
        saving = number == steps or number % settings.run.save_every == 0 or stopping
        showing = number % settings.run.log_every == 0
        if saving or evaluating or showing:
            finished = jax.device_get(unlogged)  # waits for the device, so it comes first
            rows = log_steps(log, finished, watch.lap(number))
            unlogged.clear()
            if showing:
                left = (steps - number) * tokens_per_step / (watch.rate or math.nan)
                display.update(rows[-1], seconds_left=left)
            check_finite(rows, settings.run)
        if evaluating:
            loss = step.evaluate(eval_step, state.params, task.validation())
            log.write([{"step": number, "tokens": done.tokens, "valid_loss": loss}])
            display.note(
                f"step {number}/{steps}  validation loss {loss:.4f}  "
                f"ppl {progress.perplexity(loss):.4g}"
            )
        if saving:
            done = done._replace(
                elapsed=time.monotonic() - began,
                timed_tokens=watch.tokens,
                timed_seconds=watch.seconds,
                data=batches.position,
            )
            identity = config.identity(settings, task.corpus.fingerprint)
            checkpoints.save(number, state, {"identity": identity, "progress": done._asdict()})
        if saving or evaluating:
            watch.start(number)
        if stopping:
            break
    return Position(state, done)


def log_steps(
    log: progress.MetricsLog | progress.NoLog, steps: list[Done], tokens_per_second: float
) -> list[progress.Row]:
    """Writes a row for each step; returns the rows."""
    rows = [
        {"step": done.progress.step, "tokens": done.progress.tokens}
        | {name: x.item() for name, x in done.metrics._asdict().items() if name != "captured"}
        | {"tokens_per_second": tokens_per_second}
        | (
            {"subspace": subspace.reading(done.subspaces, done.metrics.captured)}
            if done.subspaces
            else {}
        )
        for done in steps
    ]
    log.write(rows)
    return rows


def check_finite(rows: list[progress.Row], run: config.RunOptions) -> None:
    """Raises `GiveUpError` when too many steps in a row were not finite."""
    for row in rows:
        if row["bad_in_a_row"] >= run.max_bad_steps:
            raise GiveUpError(
                f"loss or gradient was not finite in {run.max_bad_steps} steps in a row, the last "
                f"of them step {row['step']}. What was not finite was not applied, and the "
                f"checkpoints in {run.run_dir} are from before. Resume from there with a lower "
                f"--learning-rate, a --clip, or --dtype float32."
            )


def pause(received: int, task: Task, end: Position, saved: bool, display: progress.Display) -> int:
    """Says how to go on after a signal, and shows how far it went; returns the exit status."""
    settings = task.settings
    if host.leads():
        try:
            report.draw(settings, task.corpus.unigram_nats)
        except OSError as error:
            display.warn(f"the pictures could not be drawn: {error}")
    name = signal.Signals(received).name
    if not saved:
        display.warn(f"{name}: stopped at step {end.progress.step}, which could not be saved")
        return FAILED
    place = f" --mesh {settings.devices.mesh}" if settings.devices.mesh else ""
    display.note(
        f"{name}: saved step {end.progress.step}; go on with --run-dir {settings.run.run_dir} "
        f"--resume{place}"
    )
    return 128 + received


def finish(task: Task, end: Position, display: progress.Display) -> None:
    """Summary, pictures and closing table."""
    settings, run_dir = task.settings, task.settings.run.run_dir
    rows = progress.read_metrics(run_dir / "metrics.jsonl")
    valid = [row["valid_loss"] for row in rows if "valid_loss" in row]
    abstract_params = jax.eval_shape(gj.quant.dequantize_params, end.state.params)
    summary = {
        "optimizer": optimizers.describe(settings.optimizer),
        "learning_rate": settings.schedule.learning_rate,
        "seed": settings.run.seed,
        "steps": end.progress.step,
        "tokens": end.progress.tokens,
        "valid_loss": valid[-1],
        "valid_perplexity": progress.perplexity(valid[-1]),
        "unigram_nats": task.corpus.unigram_nats,
        "num_params": model.num_params(task.llama),
        "state_bytes": report.state_bytes(task.tx, abstract_params),
        "adamw_state_bytes": report.state_bytes(optax.adamw(0.0), abstract_params),
        "refreshes": report.refreshes(end.state.opt_state),
        "skipped_steps": end.state.opt_state.total_notfinite.item(),
        "tokens_per_second": end.progress.timed_tokens / max(end.progress.timed_seconds, 1e-9),
        "seconds": end.progress.elapsed,
        "devices": task.devices,
        "config": config.to_json(settings),
    }
    report.draw(settings, task.corpus.unigram_nats)
    host.write_json(run_dir / "summary.json", summary)
    display.console.print(report.summary_table(summary))


if __name__ == "__main__":
    sys.exit(main())
