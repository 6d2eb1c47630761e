"""Training Llama 7B in 16 and 24 GB of a GPU: some steps on real tokens.

    python -m benchmarks.limited_memory [--preset 7b] [--steps 50] [--sequence 2048] [--context 1]

Q-GaLore with INT8 weights in 16 GB, 8-bit GaLore with bf16 weights in 24 GB, layer by layer with
the projected backward pass, one sequence per step of the example's default corpus, every parameter
trains. JAX is given a pool of the limit less `--context` GB (for what else lives on such a card:
the driver's context and libraries) and fails beyond it. The limits are of 1e9 bytes.
"""

import argparse
import time
from typing import Any

import jax

from benchmarks import device_memory, isolated, report
from examples.llama import config, train
from examples.llama.presets import PRESETS
from examples.llama.task import make_task

# Options of the trainer, and the size of the card in GB.
RECIPES = {
    "Q-GaLore, INT8 weights": (("--optimizer", "q_galore_adamw8bit", "--weights", "int8"), 16),
    "8-bit GaLore": (("--optimizer", "galore_adamw8bit"), 24),
}
COLUMNS = (
    "first loss",
    "last loss",
    "skipped steps",
    "peak, GB",
    "pool, GB",
    "process, GB",
    "tokens/s",
    "step, s",
    "step, s, median",
    "first step, s",
    "note",
)
WHOLE = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "1.0", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="7b", choices=PRESETS)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--head-chunk", type=int, default=256)
    parser.add_argument("--context", type=float, default=1.0, help="GB that JAX is not given")
    options = parser.parse_args()
    available = isolated.call(device_memory.total, environment=WHOLE)
    rows = []
    for name, (recipe, card) in RECIPES.items():
        pool = int((card - options.context) * 1e9)
        if available is not None and pool > available:
            measured = {"note": f"not run: the device has {available / 1e9:.1f} GB"}
        else:
            line = [*trainer_options(options), *recipe]
            measured = isolated.row(run, line, environment=limit(pool, available))
        row = {"recipe": name, "card, GB": card}
        rows.append(row | {column: measured.get(column, "") for column in COLUMNS})
    title = f"Llama {options.preset}, {options.steps} steps of {options.sequence} tokens"
    report.publish(title, rows, "limited_memory")


def limit(pool: int, available: int | None) -> dict[str, str]:
    """What makes JAX allocate a pool of so many bytes at once, and never more."""
    if available is None:  # a CPU does not know its memory, and cannot be limited
        return {}
    return {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{pool / available:.6f}",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
    }


def trainer_options(options: argparse.Namespace) -> list[str]:
    """The command line of the example; it does not clip, which would walk the layers twice."""
    return [
        *("--preset", options.preset, "--steps", str(options.steps), "--clip", "0"),
        *("--batch-size", "1", "--seq-len", str(options.sequence), "--learning-rate", "1e-3"),
        *("--dtype", "bfloat16", "--param-dtype", "bfloat16", "--layerwise"),
        *("--head-chunk", str(options.head_chunk)),
    ]


def run(line: list[str]) -> dict[str, Any]:
    """Trains; meant for a process of its own. Nothing is saved or evaluated."""
    task = make_task(config.resolve(config.parse(line)))
    key = jax.random.fold_in(jax.random.key(task.settings.run.seed), train.ROUNDING)
    advance, batches = task.train_step(key), task.training(None)
    state = task.new_state()
    losses, seconds = [], []
    for _ in range(task.settings.schedule.steps):
        batch = next(batches)
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(advance(state, batch))
        seconds.append(time.perf_counter() - began)
        losses.append(float(metrics.loss))
    skipped = int(metrics.skipped)
    batches.close()
    later = sorted(seconds[1:]) or seconds
    return {
        "first loss": losses[0],
        "last loss": losses[-1],
        "skipped steps": skipped,
        "tokens/s": task.settings.data.seq_len / (sum(later) / len(later)),
        "step, s": later[0],
        "step, s, median": later[len(later) // 2],
        "first step, s": seconds[0],
        **device_memory.used(),
    }


if __name__ == "__main__":
    main()
