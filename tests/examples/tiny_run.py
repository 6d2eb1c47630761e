"""Runs of the trainer that last a second: the corpus, the command line, what they leave behind."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache as compilation_cache_module
from orbax.checkpoint.experimental import v1 as ocp

from examples.llama import train

VOCAB = 64
SIZES = {
    "hidden-size": 16,
    "intermediate-size": 32,
    "num-layers": 2,
    "num-heads": 2,
    "vocab-size": VOCAB,
    "seq-len": 16,
    "batch-size": 4,
}
SHORT = {"steps": 8, "eval-every": 4, "eval-batches": 2, "save-every": 4, "log-every": 2}
OPTIMIZER = {"learning-rate": 3e-3, "seed": 0}
GALORE = {"optimizer": "galore_adamw", "rank": 4, "gap": 3, "refresh": "staggered"}


def write_corpus(directory: Path) -> Path:
    """Text of a Markov chain, which a model can learn something about."""
    rng = np.random.default_rng(0)
    likely = rng.integers(VOCAB, size=(VOCAB, 4))
    tokens = np.zeros(6000, np.uint16)
    for i in range(1, len(tokens)):
        tokens[i] = likely[tokens[i - 1], rng.integers(4)]
    np.save(directory / "train.npy", tokens[:5000])
    np.save(directory / "valid.npy", tokens[5000:])
    return directory


def arguments(corpus: Path, run_dir: Path, *flags: str, **options: object) -> list[str]:
    """The command line of a tiny run; options by their Python names."""
    paths = [str(corpus / "train.npy"), str(corpus / "valid.npy")]
    named = SIZES | SHORT | OPTIMIZER | {k.replace("_", "-"): v for k, v in options.items()}
    line = ["--run-dir", str(run_dir), "--source", "tokens", "--paths", *paths]
    for name, value in named.items():
        line += [f"--{name}", str(value)]
    return [*line, *flags]


def run(corpus: Path, run_dir: Path, *flags: str, **options: object) -> int:
    """Trains in this process; the exit status."""
    return train.main(arguments(corpus, run_dir, *flags, **options))


def rows(run_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl, but for what the clock put in."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def arrays(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """Every leaf of the training state in a checkpoint."""
    path = run_dir / "checkpoints" / f"{step:08d}"
    record = json.loads((path / "run.json").read_text())
    template = {name: _abstract(signature) for name, signature in record["leaves"].items()}
    stored = {name: leaf for name, leaf in template.items() if leaf.size}
    loaded = ocp.load_checkpointables(path, {"arrays": stored})["arrays"]
    return {name: np.asarray(leaf) for name, leaf in loaded.items()}


def _abstract(signature: str) -> jax.ShapeDtypeStruct:
    """What `float32[2,3]` stands for, on one device whatever it was saved from."""
    dtype, shape = signature.removesuffix("]").split("[")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct([int(n) for n in shape.split(",") if n], dtype, sharding=here)


@contextlib.contextmanager
def compilation_cache(directory: Path) -> Iterator[None]:
    """Programs are compiled once for all runs of a test module, and of its child processes."""
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _configure(settings)
    try:
        yield
    finally:
        _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    # JAX looks at the settings once, at its first compilation.
    compilation_cache_module.reset_cache()


def command(cache: Path, line: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Program and environment of a run in a process of its own."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    return [sys.executable, "-m", "examples.llama.train", *line], environment


def saved_identity(run_dir: Path, step: int) -> dict[str, Any]:
    """What a checkpoint insists on."""
    path = run_dir / "checkpoints" / f"{step:08d}" / "run.json"
    return json.loads(path.read_text())["identity"]
