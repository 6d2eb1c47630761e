"""The static description of a lens, carried in its state for the tools that walk states."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.codecs import Codec, identity
from galore_jax.mapped import AxisName, check_axis_name
from galore_jax.projectors import Projector, randomized_svd
from galore_jax.refresh import RefreshPolicy, as_policy
from galore_jax.transport import Transport, align
from galore_jax.views.axes import AxesRule, axes_rule
from galore_jax.views.matrix_view import Side, check_side
from galore_jax.views.plan import RankLike, check_rank
from galore_jax.views.targets import Targets, check_targets

# What decides the shapes and the meaning of stored arrays: a state made with other values cannot
# go on. Everything else (gap, transport, projector, axis_name, seed) may change between runs.
_FIXED = ("rank", "side", "axes", "targets", "codec", "state_dtype")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LowRankConfig:
    """Everything static about a lens; knows no parameters, holds nothing that may be traced."""

    rank: RankLike
    side: Side
    axes: AxesRule
    targets: Targets
    projector: Projector
    refresh: RefreshPolicy
    transport: Transport
    codec: Codec
    state_dtype: Any
    axis_name: AxisName
    seed: int


def low_rank_config(
    rank: RankLike,
    *,
    projector: Projector | None,
    refresh: RefreshPolicy | int,
    transport: Transport | None,
    side: Side,
    axes: Any,
    targets: Targets,
    codec: Codec | None,
    state_dtype: jax.typing.DTypeLike,
    axis_name: AxisName,
    seed: int | None,
) -> LowRankConfig:
    """Fills in the defaults and checks everything that can be checked without parameters."""
    check_rank(rank)
    check_side(side)
    check_targets(targets)
    projector = _instance("projector", projector, Projector, default=randomized_svd())
    transport = _instance("transport", transport, Transport, default=align())
    codec = _instance("codec", codec, Codec, default=identity())
    if transport.needs_canonical_columns and not projector.canonical_columns:
        raise ValueError(
            f"transport {transport} leaves moments where they are, but the columns of {projector} "
            "mean something else after every refresh. Use transport.align(), or a projector with "
            "canonical columns (svd, gram_eigh)."
        )
    policy = as_policy(refresh)
    if policy.compares_columns and not (transport.keeps_columns and projector.canonical_columns):
        raise ValueError(
            f"{policy} compares columns, but {projector} with {transport} gives them another "
            'meaning at every refresh. Use mode="overlap", or svd or gram_eigh with '
            "transport.keep(), reset() or rotate()."
        )
    dtype = jnp.dtype(state_dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`state_dtype` must be a floating dtype, got {dtype.name}.")
    if seed is None:
        seed = 0
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(
            f"`seed` must be a Python integer, got {seed!r}. Under optax.inject_hyperparams pass "
            "static_args=galore_jax.STATIC_ARGS."
        )
    return LowRankConfig(
        rank=rank,
        side=side,
        axes=axes_rule(axes),
        targets=targets,
        projector=projector,
        refresh=policy,
        transport=transport,
        codec=codec,
        state_dtype=dtype,
        axis_name=check_axis_name(axis_name),
        seed=seed,
    )


def check_same_storage(config: LowRankConfig, stored: LowRankConfig) -> None:
    """Raises if a state made under `stored` cannot be continued under `config`."""
    for name in _FIXED:
        ours, theirs = getattr(config, name), getattr(stored, name)
        if callable(ours) or callable(theirs):
            continue  # compare by identity only; the shapes will tell
        if ours != theirs:
            raise ValueError(
                f"this state was made with {name}={theirs!r}, but the transformation has "
                f"{name}={ours!r}. Gap, scale, projector and transport may change on resume; "
                f"{name} fixes the stored arrays. Restore with the old value or init anew."
            )


def _instance(name: str, value: Any, kind: type, *, default: Any) -> Any:
    if value is None:
        return default
    if not isinstance(value, kind):
        hint = (
            f" Did you forget the parentheses: {value.__name__}()?"
            if isinstance(value, type)
            else ""
        )
        raise TypeError(f"`{name}` must be a {kind.__name__}, got {value!r}.{hint}")
    return value
