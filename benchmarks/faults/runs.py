"""Runs of the Llama example that faults are tried on: small ones, in processes of their own."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from orbax.checkpoint.experimental import v1 as ocp

from examples.llama import feed, progress, train

VOCAB = 64
SAVE_EVERY = 3
SIZES = {
    "hidden-size": 16,
    "intermediate-size": 32,
    "num-layers": 2,
    "num-heads": 2,
    "vocab-size": VOCAB,
    "seq-len": 16,
    "batch-size": 4,
}
_RECIPE = {
    "steps": 24,
    "save-every": SAVE_EVERY,
    "eval-every": 12,
    "eval-batches": 2,
    "log-every": SAVE_EVERY,
    "learning-rate": 3e-3,
    "seed": 0,
    "gap": 3,
}
_GALORE = {"optimizer": "galore_adamw", "rank": 4}
# Wide enough that moments are stored in 8 bits.
_Q_GALORE = {
    "hidden-size": 64,
    "intermediate-size": 256,
    "optimizer": "q_galore_adamw8bit",
    "weights": "int8",
    "rank": 8,
}
# Options by their names on the command line; flags have no value.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": _GALORE,
    "layerwise": _GALORE | {"layerwise": None},
    "q_galore, int8": _Q_GALORE,
}


class DrillError(AssertionError):
    """A run that did not come through as it should have."""


def insist(condition: Any, problem: str) -> None:
    """Raises `DrillError` with the problem unless the condition holds."""
    if not condition:
        raise DrillError(problem)


def write_corpus(directory: Path) -> Path:
    """Text of a Markov chain, which a model can learn something about."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    likely = rng.integers(VOCAB, size=(VOCAB, 4))
    tokens = np.zeros(6000, np.uint16)
    for i in range(1, len(tokens)):
        tokens[i] = likely[tokens[i - 1], rng.integers(4)]
    np.save(directory / "train.npy", tokens[:5000])
    np.save(directory / "valid.npy", tokens[5000:])
    return directory


@dataclasses.dataclass(frozen=True)
class Run:
    """A run and its directory.

    Args:
      directory: Of the run.
      corpus: Directory of the token files.
      options: By their names on the command line; None for a flag, a tuple for several values.
      output: Where its processes say what they say; beside the directory.
    """

    directory: Path
    corpus: Path
    options: Mapping[str, Any]
    output: Path | None = None

    def line(self, *more: str) -> list[str]:
        """Arguments of the trainer."""
        paths = [str(self.corpus / f"{part}.npy") for part in ("train", "valid")]
        words = ["--run-dir", str(self.directory), "--source", "tokens", "--paths", *paths]
        for name, value in (SIZES | _RECIPE | dict(self.options)).items():
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            words += [f"--{name}", *map(str, values)]
        return [*words, *more]

    def start(self, *more: str) -> subprocess.Popen[str]:
        """The trainer in a process of its own; what it says goes to a file beside the run."""
        command = [sys.executable, "-m", "examples.llama.train", *self.line(*more)]
        with self._output.open("a") as output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)

    @property
    def _output(self) -> Path:
        return self.output or self.directory.with_suffix(".output")

    def said(self) -> str:
        """All that its processes have said so far, without line breaks."""
        return " ".join(self._output.read_text().split()) if self._output.exists() else ""

    def call(self, *more: str) -> tuple[int, str]:
        """The trainer in this process: its exit status, and what it said without line breaks."""
        return call(self.line(*more))

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, but for what the clock put in."""
        path = self.directory / "metrics.jsonl"
        written = progress.read_metrics(path) if path.exists() else []
        return [{k: v for k, v in row.items() if "second" not in k} for row in written]

    @property
    def logged(self) -> int:
        """The last step in the log."""
        return max((row["step"] for row in self.rows()), default=0)

    @property
    def saved(self) -> int:
        """The step of the newest finished checkpoint; 0 without any."""
        names = [path.name for path in self.checkpoints.glob("*") if path.name.isdigit()]
        return max(map(int, names), default=0)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def newest(self) -> Path:
        """The newest finished checkpoint."""
        return self.checkpoints / f"{self.saved:08d}"

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """Every leaf of the training state in a checkpoint, by its path."""
        return saved_arrays(self.directory, step)


def saved_arrays(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """Every leaf of the training state in a checkpoint of a run, by its path."""
    path = run_dir / "checkpoints" / f"{step:08d}"
    record = json.loads((path / "run.json").read_text())
    leaves = {name: _abstract(signature) for name, signature in record["leaves"].items()}
    stored = {name: leaf for name, leaf in leaves.items() if leaf.size}
    loaded = ocp.load_checkpointables(path, {"arrays": stored})["arrays"]
    return {name: np.asarray(leaf) for name, leaf in loaded.items()}


def call(line: Sequence[str]) -> tuple[int, str]:
    """The trainer in this process: its exit status, and what it said without line breaks."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        status = train.main(line)
    return status, " ".join(heard.getvalue().split())


def _abstract(signature: str) -> jax.ShapeDtypeStruct:
    """What ``float32[2,3]`` stands for, on one device."""
    dtype, shape = signature.removesuffix("]").split("[")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct([int(n) for n in shape.split(",") if n], dtype, sharding=here)


def insist_same(run: Run, reference: Run) -> None:
    """Raises unless both runs have the same log and the same last state, bit for bit."""
    mine, wanted = run.rows(), reference.rows()
    for one, other in zip(mine, wanted, strict=False):
        insist(one == other, f"the log has {one}, an undisturbed run {other}")
    insist(len(mine) == len(wanted), f"{len(mine)} rows in the log, not {len(wanted)}")
    insist(run.saved == reference.saved, f"the last state is that of step {run.saved}")
    insist_same_arrays(run.arrays(run.saved), reference.arrays(reference.saved))


def insist_same_arrays(mine: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    """Raises unless they are equal bit for bit; names the first that are not."""
    insist(mine.keys() == wanted.keys(), f"other leaves: {sorted(mine.keys() ^ wanted.keys())}")
    for name, leaf in mine.items():
        same = leaf.dtype == wanted[name].dtype and leaf.tobytes() == wanted[name].tobytes()
        insist(same, f"{name} differs")


def wait_for(run: Run, step: int, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Until a step is in the log.

    Raises:
      DrillError: The process ended before, or time is up.
    """
    end = time.monotonic() + seconds
    while run.logged < step:
        insist(process.poll() is None, f"ended before step {step}: ... {run.said()[-300:]}")
        insist(time.monotonic() < end, f"did not come to step {step} in {seconds} s")
        time.sleep(0.02)


def finish(run: Run) -> str:
    """Goes on in this process, to the end; returns what it said.

    Raises:
      DrillError: It did not finish.
    """
    status, said = run.call("--resume")
    insist(status == train.FINISHED, f"ended with status {status}: ... {said[-300:]}")
    return said


@contextlib.contextmanager
def batches(weights: Mapping[int, float], *, leave_out: Sequence[int] = ()) -> Iterator[None]:
    """Training in this process gets batches whose tokens have weights, all 1 but for these.

    A weight that is no number makes a loss and gradients that are none; weights of zero make
    gradients of zero.

    Args:
      weights: By the number of the batch, from 1.
      leave_out: Batches that are passed over.
    """
    following = feed.Training.__next__

    def following_weighted(self: feed.Training) -> Any:
        batch = following(self)
        number = self.position["global_next_index"] // SIZES["batch-size"]
        if number in leave_out:
            return following_weighted(self)
        tokens = batch["targets"]
        value = np.full(tokens.shape, weights.get(number, 1.0), np.float32)
        return batch | {"weights": jax.device_put(value, tokens.sharding)}

    feed.Training.__next__ = following_weighted
    try:
        yield
    finally:
        feed.Training.__next__ = following


@contextlib.contextmanager
def compiled_once(directory: Path) -> Iterator[None]:
    """Programs are compiled once for all runs, in this process and in others."""
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    outside = {name.upper(): os.environ.pop(name.upper(), None) for name in settings}
    os.environ.update({name.upper(): str(value) for name, value in settings.items()})
    _configure(settings)
    try:
        yield
    finally:
        for name, value in outside.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value
        _configure(before)


def _configure(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    # JAX looks at the settings once, at its first compilation.
    compilation_cache.reset_cache()
