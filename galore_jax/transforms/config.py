"""The static description of a lens, carried in its state for the tools that walk states."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax import serialization
from galore_jax.checks import check_floating
from galore_jax.codecs import Codec
from galore_jax.collectives import AxisName, check_axis_name
from galore_jax.projectors import Projector, randomized_svd
from galore_jax.recovery import Recovery, drop
from galore_jax.refresh import RefreshPolicy, as_policy
from galore_jax.transport import Transport, align
from galore_jax.views.axes import axes_rule
from galore_jax.views.matrix_view import Side, check_side
from galore_jax.views.plan import RankLike, Rules, rank_rule
from galore_jax.views.targets import Targets, targets_rule


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LowRankConfig(Rules, metaclass=serialization.Known):
    """Everything static about a lens; knows no parameters, holds nothing that may be traced.

    The fields are the arguments of `low_rank_projection`. Two lenses of equal construction have
    equal configs, callables included: `galore_jax.rules` compares those by what they run.
    """

    projector: Projector
    refresh: RefreshPolicy
    transport: Transport
    recovery: Recovery
    codec: Codec
    state_dtype: Any
    axis_name: AxisName
    seed: int


# Flax keeps the config of the state that it restores into.
serialization.register(LowRankConfig)


def low_rank_config(
    rank: RankLike,
    *,
    projector: Projector | None,
    refresh: RefreshPolicy | int,
    transport: Transport | None,
    recovery: Recovery | None,
    side: Side,
    axes: Any,
    targets: Targets,
    codec: Codec | None,
    state_dtype: jax.typing.DTypeLike,
    axis_name: AxisName,
    seed: int | None,
) -> LowRankConfig:
    """The defaults filled in, and everything checked that can be checked without parameters."""
    rank = rank_rule(rank)
    check_side(side)
    projector = _instance("projector", projector, Projector, default=randomized_svd())
    transport = _instance("transport", transport, Transport, default=align())
    recovery = _instance("recovery", recovery, Recovery, default=drop())
    codec = _instance("codec", codec, Codec, default=projector.default_codec)
    policy = as_policy(refresh)
    _check_columns(projector, transport, recovery, policy)
    dtype = check_floating("state_dtype", state_dtype)
    if dtype == jnp.float16:
        raise TypeError(
            "`state_dtype` is float16, in which the square of an entry below 2e-4 is zero: Adam "
            "would divide by nothing. Use bfloat16 for fewer bytes, or float32."
        )
    if seed is None:
        seed = 0
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(
            f"`seed` must be an integer, got {seed!r}. Under optax.inject_hyperparams pass "
            "static_args=galore_jax.STATIC_ARGS."
        )
    return LowRankConfig(
        rank=rank,
        side=side,
        axes=axes_rule(axes),
        targets=targets_rule(targets),
        projector=projector,
        refresh=policy,
        transport=transport,
        recovery=recovery,
        codec=codec,
        state_dtype=dtype,
        axis_name=check_axis_name(axis_name),
        seed=int(seed),
    )


def _check_columns(
    projector: Projector, transport: Transport, recovery: Recovery, policy: RefreshPolicy
) -> None:
    """Raises if a part needs columns that the projector does not deliver."""
    if transport.needs_canonical_columns and not projector.canonical_columns:
        raise ValueError(
            f"transport {transport} leaves moments where they are, but the columns of {projector} "
            "mean something else after every refresh. Use transport.align(), or a projector with "
            "canonical columns (svd, gram_eigh)."
        )
    if policy.compares_columns and not (transport.keeps_columns and projector.canonical_columns):
        raise ValueError(
            f"{policy} compares columns, but {projector} with {transport} gives them another "
            'meaning at every refresh. Use mode="overlap", or svd or gram_eigh with '
            "transport.keep(), reset() or rotate()."
        )
    for part in (transport, recovery):
        if part.needs_orthonormal and not projector.orthonormal:
            raise ValueError(
                f"{part} takes the columns of a basis for orthonormal, but those of {projector} "
                "are not. Use transport.reset(), or a projector whose columns are."
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
