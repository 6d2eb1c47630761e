"""What a run takes of a device's memory: ``python -m examples.llama.plan``, flags as for `train`.

Nothing is allocated, and no corpus is read. The estimate is a model of the step
(`planning/phases.py`); ``--compile`` asks the compiler as well.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
import rich.console
import tyro

from examples.llama import config, mesh, model, optimizers, progress
from examples.llama.attention import CUDNN_MAX_HEAD_DIM, has_flash_kernel
from examples.llama.planning import compiled, table
from examples.llama.planning.estimate import estimate
from examples.llama.planning.run import Run, abstract_mesh, make_run

FINISHED, FAILED = 0, 1


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Say what memory a run of `train` with the same flags takes of a device.

    Exit status: 0; 1 refused, with the reason; 2 bad command line.
    """

    train: config.TrainConfig = dataclasses.field(default=config.TrainConfig())
    compile: Literal["no", "cpu", "cuda"] = "no"
    """Compile the step and show the compiler's own figures; cuda needs its compiler, but no GPU."""
    attention: Literal["xla", "cudnn"] = "xla"
    """Kernel that is counted with: XLA's has scores, cuDNN's (16 bits, on NVIDIA) has none."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line program; returns its exit status."""
    console = rich.console.Console()
    try:
        options = parse(argv)
        console.print(plan(options))
    except ValueError as error:
        if os.environ.get("TRACEBACK"):
            raise
        progress.show_error(console, f"{error}\n(set TRACEBACK=1 to see where it came from)")
        return FAILED
    return FINISHED


def parse(argv: Sequence[str] | None = None) -> PlanConfig:
    """The command line as a value."""
    return tyro.cli(
        PlanConfig,
        args=argv,
        prog="python -m examples.llama.plan",
        config=(tyro.conf.OmitArgPrefixes,),
    )


def plan(options: PlanConfig) -> Any:
    """The table of a plan.

    Raises:
        ValueError: the options do not fit each other.
    """
    check(options)
    settings = config.resolve(options.train)
    axes = settings.devices.mesh
    sizes = mesh.parse_axes(axes or "data=1")
    if options.compile != "no":
        compiled.prepare(options.compile, math.prod(sizes.values()))
    planned = make_run(settings, abstract_mesh(axes))
    check_kernel(options, planned.llama)
    check_step(planned)
    found = None
    if options.compile != "no":
        devices = compiled.target_mesh(options.compile, axes)
        found = compiled.compile_step(make_run(settings, devices), options.compile)
    run = make_run(settings, abstract_mesh(axes), attention=options.attention)
    return table.table(estimate(run), found, title=title(settings, run.llama))


def check(options: PlanConfig) -> None:
    """Raises where options contradict each other."""
    if options.compile != "no" and options.attention == "cudnn":
        raise ValueError(
            "--attention cudnn --compile: its kernel needs a GPU. Compile with --attention xla."
        )


def check_kernel(options: PlanConfig, llama: model.LlamaConfig) -> None:
    """Raises where the kernel that is counted with does not take the model's attention."""
    if options.attention == "cudnn" and not has_flash_kernel(llama.dtype, llama.head_dim):
        raise ValueError(
            f"--attention cudnn: its kernel takes 16 bits and heads of a multiple of 8 up to "
            f"{CUDNN_MAX_HEAD_DIM} features, but --dtype is {options.train.model.dtype} and a head "
            f"has {llama.head_dim}. Give --dtype bfloat16 and other --num-heads, or --attention "
            f"xla with an --attention-chunk."
        )


def check_step(run: Run) -> None:
    """Raises what `train` would raise when it makes its first step."""
    jax.eval_shape(run.task.train_step(None), run.state, run.batch)


def title(settings: config.TrainConfig, llama: model.LlamaConfig) -> str:
    """What is planned, in two lines."""
    rows = settings.data.batch_size // settings.data.accumulation
    lines = [
        f"{settings.model.preset}, {model.num_params(llama):,} parameters, "
        f"{rows} x {settings.data.seq_len} tokens at a time",
        optimizers.describe(settings.optimizer),
    ]
    if settings.devices.mesh:
        lines.append(f"each of {settings.devices.mesh}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
