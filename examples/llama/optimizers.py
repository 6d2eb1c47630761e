"""The optimizers to choose from: GaLore around several others, and what it is compared with.

Each entry of `_BUILDERS` is a few lines of Optax. Everything they share (clipping, the guard
against non-finite steps) is added once, in `make_optimizer`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro

import galore_jax as gj

# The leaves that GaLore projects: the kernels of attention and MLP, stacked over the layers.
BLOCK_MATRICES = re.compile(r"(^|/)blocks/.*/kernel($|/)")

OptimizerName = Literal[
    "galore_adamw",
    "galore_adafactor",
    "galore_lion",
    "galore_sgd",
    "galore_adamw8bit",
    "q_galore_adamw8bit",
    "adamw",
    "adamw8bit",
    "adafactor",
    "optax_galore",
]

ProjectorName = Literal[
    "svd", "randomized_svd", "gram_eigh", "subspace_iteration", "random_orthonormal"
]


def default(text: str) -> Any:
    """What --help shows as the default of an option whose None means something."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


FROM_PRESET = default("the preset's")


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer. Options that the chosen one does not have are refused when they are set."""

    optimizer: OptimizerName = "galore_adamw"
    """Which optimizer; optax_galore is optax.contrib.galore, for comparison."""
    rank: Annotated[int | float | None, FROM_PRESET] = None
    """Rank of the projected gradients: a number, or a fraction (0.25) of the projected width."""
    gap: Annotated[int | None, FROM_PRESET] = None
    """Steps between two refreshes of a projector."""
    refresh: Annotated[
        Literal["every", "staggered", "adaptive"] | None, default("every; q_galore: adaptive")
    ] = None
    """All projectors on the same step, spread over the gap, or ever less often as they settle."""
    threshold: Annotated[float | None, default("0.6")] = None
    """adaptive only: overlap of two subspaces in a row from which the gap grows."""
    scale: Annotated[float | None, FROM_PRESET] = None
    """GaLore's alpha: factor on the update of projected matrices."""
    projector: Annotated[ProjectorName | None, default("randomized_svd")] = None
    """How a basis is found from a gradient."""
    side: Annotated[Literal["short", "long", "input", "output"] | None, default("short")] = None
    """Which axis of a matrix is projected."""
    transport: Annotated[Literal["align", "keep", "reset", "rotate"] | None, default("align")] = (
        None
    )
    """What happens to the moments when the basis moves."""
    codec: Annotated[
        Literal["identity", "bfloat16", "int8", "int4"] | None,
        default("identity; 8bit: bfloat16; q_galore: int4"),
    ] = None
    """What the projectors are stored in."""
    backward: Annotated[
        Literal["projected", "full"] | None, default("projected where the projector allows it")
    ] = None
    """Project gradients as they arise, or form them first."""
    matrix_lr_scale: Annotated[float | None, default("1")] = None
    """adamw and adamw8bit: factor on the block matrices' rate; 0.25 is GaLore's split."""
    b1: float = 0.9
    """Decay of the first moment (the momentum of galore_sgd)."""
    b2: Annotated[float | None, default("0.999, lion 0.99")] = None
    """Decay of the second moment; not for adafactor and sgd."""
    weight_decay: float = 0.0
    """Decoupled weight decay of all weights but the norm scales; the papers use none."""


# Default peak rate relative to the recipe's, which is GaLore's: the paper trained full-rank Adam at
# a tenth of it or less, and Lion's sign updates want about as much less than Adam's.
RATE = {"adamw": 0.1, "adamw8bit": 0.1, "adafactor": 0.1, "galore_lion": 0.1}

_LENS_DEFAULTS = {
    "refresh": "every",
    "projector": "randomized_svd",
    "side": "short",
    "transport": "align",
    "codec": "identity",
}
_FORMS_GRADIENT = ("svd", "gram_eigh")
_ADAPTIVE = {"refresh": "adaptive", "threshold": 0.6}
_CODECS: dict[str, Callable[[], Any]] = {
    "identity": gj.codecs.identity,
    "bfloat16": functools.partial(gj.codecs.cast, "bfloat16"),
    "int8": gj.codecs.int8,
    "int4": gj.codecs.int4,
}


def resolve(options: OptimizerOptions, *, rank: int | float, gap: int, scale: float):
    """Fills what was left open; refuses what would have no effect."""
    lens = {"rank": rank, "gap": gap, "scale": scale}
    exact = options.projector in _FORMS_GRADIENT
    if exact and options.backward == "projected":
        raise ValueError(
            f"--backward projected: --projector {options.projector} needs the gradient itself. "
            "Choose randomized_svd, subspace_iteration or random_orthonormal."
        )
    ours = _LENS_DEFAULTS | {"backward": "full" if exact else "projected"}
    if options.refresh == "adaptive":
        lens |= _ADAPTIVE
    defaults: dict[str, Any] = {
        "galore_adamw": ours | lens | {"b2": 0.999},
        "galore_adafactor": ours | lens,
        "galore_lion": ours | lens | {"b2": 0.99},
        "galore_sgd": ours | lens,
        "galore_adamw8bit": ours | lens | {"b2": 0.999, "codec": "bfloat16"},
        "q_galore_adamw8bit": ours
        | (_ADAPTIVE if options.refresh is None else {})
        | lens
        | {"b2": 0.999, "codec": "int4"},
        "adamw": {"matrix_lr_scale": 1.0, "b2": 0.999},
        "adamw8bit": {"matrix_lr_scale": 1.0, "b2": 0.999},
        "adafactor": {},
        "optax_galore": lens | {"b2": 0.999},
    }[options.optimizer]
    given = {
        field.name
        for field in dataclasses.fields(options)
        if field.default is None and getattr(options, field.name) is not None
    }
    if idle := sorted(given - defaults.keys()):
        flags = ", ".join("--" + name.replace("_", "-") for name in idle)
        raise ValueError(
            f"{flags}: no effect on --optimizer {options.optimizer}. Drop it, or choose "
            f"an optimizer that has it."
        )
    missing = {k: v for k, v in defaults.items() if getattr(options, k) is None}
    return dataclasses.replace(options, **missing)


def describe(options: OptimizerOptions) -> str:
    """One line: the name and the options in force."""
    used = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
    name = used.pop("optimizer")
    return f"{name}({', '.join(f'{k}={v}' for k, v in used.items())})"


def make_schedule(*, learning_rate: float, steps: int, warmup: int) -> optax.Schedule:
    """Linear from 0 over the warm-up, then a cosine down to a tenth of the peak, as in the papers.

    The first update therefore has a learning rate of zero, in the released code as well.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=0.1 * learning_rate,
    )


def make_optimizer(
    options: OptimizerOptions, schedule: optax.Schedule, *, clip: float, seed: int
) -> optax.GradientTransformationExtraArgs:
    """Clipping, then the chosen optimizer, all of it skipped on a non-finite gradient."""
    return gj.apply_if_finite(
        _chain(
            optax.clip_by_global_norm(clip) if clip else optax.identity(), options, schedule, seed
        ),
        # Past its limit the bad update would be applied; here the training loop gives up instead.
        max_consecutive_errors=jnp.iinfo(jnp.int32).max - 1,
    )


def make_layerwise_optimizer(
    options: OptimizerOptions, schedule: optax.Schedule, *, seed: int
) -> optax.GradientTransformationExtraArgs:
    """What `make_optimizer` protects, for a step that clips and skips by itself."""
    return _chain(optax.identity(), options, schedule, seed)


def _chain(
    clip: optax.GradientTransformation,
    options: OptimizerOptions,
    schedule: optax.Schedule,
    seed: int,
) -> optax.GradientTransformationExtraArgs:
    """The stateless link is always there (`identity` where it does nothing).

    So switching clipping on or off, or steps by layers, does not change the layout of the state:
    such a run can be resumed.
    """
    return optax.chain(clip, _BUILDERS[options.optimizer](options, schedule, seed))


def _galore(alias: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    def build(options: OptimizerOptions, schedule: optax.Schedule, seed: int):
        return alias(
            schedule,
            options.rank,
            update_proj_gap=_refresh(options),
            scale=options.scale,
            projector=getattr(gj.projectors, options.projector)(),
            side=options.side,
            transport=getattr(gj.transport, options.transport)(),
            codec=_CODECS[options.codec](),
            axes=gj.MatrixAxes(-2, -1),
            weight_decay=options.weight_decay,
            mask=_decays,
            seed=seed,
            **fixed,
            **_moments(options),
        )

    return build


def _refresh(options: OptimizerOptions) -> Any:
    if options.refresh == "adaptive":
        return gj.refresh.adaptive(options.gap, options.threshold)
    return getattr(gj.refresh, options.refresh)(options.gap)


def _moments(options: OptimizerOptions) -> dict[str, float]:
    """The decay rates under the names that the optimizer calls them by."""
    match options.optimizer:
        case "galore_adafactor" | "galore_sgd":
            return {"momentum": options.b1}
        case _:
            return {"b1": options.b1, "b2": options.b2}


def _adamw(options: OptimizerOptions, schedule: optax.Schedule, seed: int):
    del seed
    adam = gj.scale_by_adam8bit if options.optimizer == "adamw8bit" else optax.scale_by_adam
    return optax.chain(
        adam(b1=options.b1, b2=options.b2),
        _scale_block_matrices(options.matrix_lr_scale),
        optax.add_decayed_weights(options.weight_decay, mask=_decays),
        optax.scale_by_learning_rate(schedule),
    )


def _adafactor(options: OptimizerOptions, schedule: optax.Schedule, seed: int):
    del seed
    # As the paper ran it: with a given rate instead of a relative one, and with a first moment.
    # The links of optax.adafactor, whose own weight decay is not multiplied by the learning rate.
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.ema(options.b1, debias=False),
        optax.add_decayed_weights(options.weight_decay, mask=_decays),
        optax.scale_by_learning_rate(schedule),
    )


def _optax_galore(options: OptimizerOptions, schedule: optax.Schedule, seed: int):
    del seed
    if not isinstance(options.rank, int):
        raise ValueError(
            f"--rank {options.rank}: optax.contrib.galore takes a whole number, not a fraction"
        )
    return _unstacked(
        optax.contrib.galore(
            schedule,
            rank=options.rank,
            update_proj_gap=options.gap,
            scale=options.scale,
            base_optimizer=optax.scale_by_adam(b1=options.b1, b2=options.b2),
            weight_decay=options.weight_decay,
            mask=_decays,
            weight_dimension_numbers=_optax_dimension_numbers,
        )
    )


_BUILDERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "galore_adamw": _galore(gj.galore_adamw),
    "galore_adafactor": _galore(gj.galore_adafactor),
    "galore_lion": _galore(gj.galore_lion),
    "galore_sgd": _galore(gj.galore_sgd),
    "galore_adamw8bit": _galore(gj.galore_adamw8bit),
    "q_galore_adamw8bit": _galore(gj.q_galore_adamw8bit),
    "adamw": _adamw,
    "adamw8bit": _adamw,
    "adafactor": _adafactor,
    "optax_galore": _optax_galore,
}


def path_name(path: Any) -> str:
    """A leaf's place in its tree, as `blocks/attn/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_block_matrix(name: str) -> bool:
    """Whether a leaf (of the parameters or of a state shaped like them) is a block's kernel."""
    return BLOCK_MATRICES.search(name) is not None


def _decays(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not re.search(r"(^|/)scale($|/)", path_name(path)), params
    )


def _scale_block_matrices(factor: float) -> optax.GradientTransformation:
    return optax.stateless(
        lambda updates, _: jax.tree_util.tree_map_with_path(
            lambda path, u: factor * u if is_block_matrix(path_name(path)) else u, updates
        )
    )


def _optax_dimension_numbers(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: (
            optax.contrib.GaLoreDimensionNumbers() if is_block_matrix(path_name(path)) else None
        ),
        params,
    )


def _unstacked(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on one leaf per layer: optax.contrib.galore knows no batch axes."""

    def split(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: list(x) if is_block_matrix(path_name(path)) else x, tree
        )

    def init(params: Any) -> Any:
        return inner.init(split(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        parts, state = inner.update(
            split(updates), state, None if params is None else split(params)
        )
        stacked = jax.tree.map(
            lambda whole, part: jnp.stack(part) if isinstance(part, list) else part, updates, parts
        )
        return stacked, state

    return optax.GradientTransformation(init, update)
