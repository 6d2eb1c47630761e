"""Every benchmark: its command, where it runs, and the tables that it leaves behind."""

import dataclasses
import importlib.util
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One command.

    Args:
      name: What to call it by; also its module, unless `module` is another.
      writes: The tables, by the names of their files.
      trial: Arguments of a run that takes seconds, to see that everything works.
      arguments: Those of the figures in the README; none where they are the defaults.
      module: Below `benchmarks`.
      place: "here" measures on the default device; "anywhere" compiles or counts on a CPU,
        whatever machine it is; "gpu" is about a GPU.
      gpu: Whether it belongs to what ``--gpu`` runs.
      needs: A package without which there is nothing to do.
    """

    name: str
    writes: tuple[str, ...]
    trial: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    module: str = ""
    place: Literal["here", "anywhere", "gpu"] = "here"
    gpu: bool = False
    needs: str = ""

    @property
    def path(self) -> str:
        """Of the module that is run."""
        return f"benchmarks.{self.module or self.name}"

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files of results."""
        return tuple(f"{table}.{suffix}" for table in self.writes for suffix in ("md", "json"))

    @property
    def obstacle(self) -> str:
        """Why it cannot run in this environment; empty if it can."""
        if self.needs and not importlib.util.find_spec(self.needs.replace("-", "_")):
            return f"needs {self.needs}"
        return ""

    def about(self) -> str:
        """The first sentence of its module."""
        spec = importlib.util.find_spec(self.path)
        assert spec is not None and spec.origin is not None
        with open(spec.origin) as source:
            return source.readline().strip().strip('"')


_TINY = ("--sizes", "tiny", "--repeats", "2")

BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("state_bytes", ("memory", "memory_by_role", "state_bytes"), ("--presets", "60m"),
              place="anywhere"),
    Benchmark("accumulate", ("accumulate_buffers", "accumulate_state"), ("--presets", "60m"),
              place="anywhere"),
    Benchmark("communication", ("communication",), ("--sizes", "tiny"), place="anywhere"),
    Benchmark("captured_energy", ("captured_energy",), ("--shape", "64", "172", "--rank", "16"),
              gpu=True),
    Benchmark("compile_time", ("compile_time",), ("--preset", "tiny", "--repeats", "1")),
    Benchmark("staggered", ("staggered",),
              ("--size", "tiny", "--gap", "8", "--periods", "2"), gpu=True),
    Benchmark("int4_storage", ("int4_storage", "int4_blocks"),
              ("--size", "tiny", "--repeats", "2"), place="anywhere"),
    Benchmark("quantized_step", ("quantized_step",), _TINY, gpu=True),
    Benchmark("optimizer_step", ("optimizer_step",), _TINY, gpu=True),
    Benchmark("optimizer_step_1b", ("optimizer_step_1b",),
              (*_TINY, "--name", "optimizer_step_1b"),
              ("--sizes", "1B", "--repeats", "3", "--name", "optimizer_step_1b"),
              module="optimizer_step", gpu=True),
    Benchmark("moment_accuracy", ("moment_accuracy",), ("--steps", "12")),
    Benchmark("training_step", ("training_step", "training_flops"),
              ("--presets", "tiny", "--repeats", "1", "--batch", "2", "--seq-len", "32",
               "--counted", "60m")),
    Benchmark("layerwise_memory", ("layerwise_memory",),
              ("--presets", "tiny", "--sequence", "64"), ("--presets", "60m", "350m"),
              place="anywhere"),
    Benchmark("compiled_memory", ("compiled_memory",),
              ("--presets", "tiny", "--sequence", "256"), place="anywhere",
              needs="jax-cuda12-plugin"),
    Benchmark("unrolled", ("unrolled_h100",), ("--presets", "tiny", "--targets", "h100"),
              ("--presets", "350m", "--targets", "h100"), place="anywhere",
              needs="jax-cuda12-plugin"),
    Benchmark("tpu_compile", ("tpu_compile",), place="anywhere", needs="libtpu"),
    Benchmark("learning", ("learning", "learning_in_few_bits"),
              ("--out", "runs/trial/learning", "--first", "--", "--steps", "2", "--hidden-size",
               "32", "--intermediate-size", "64", "--num-layers", "1", "--num-heads", "2",
               "--batch-size", "2", "--seq-len", "32", "--eval-batches", "1")),
    Benchmark("drills", ("drills",), ("--only", "corpora"), place="anywhere"),
    Benchmark("throughput", ("throughput",),
              ("--presets", "tiny", "--batch", "2", "--seq-len", "32", "--steps", "2"),
              place="gpu", gpu=True),
    Benchmark("limited_memory", ("limited_memory",),
              ("--preset", "tiny", "--steps", "3", "--sequence", "64", "--head-chunk", "32"),
              place="gpu", gpu=True),
)  # fmt: skip
