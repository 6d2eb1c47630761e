"""The static decision for every leaf: its path, its matrix view, its rank, and why."""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_jax.leaves import Leaves
from galore_jax.rules import Rule
from galore_jax.views.axes import (
    AxesByPath,
    AxesRule,
    AxesTree,
    MatrixAxes,
    axes_per_leaf,
    axes_rule,
)
from galore_jax.views.matrix_view import MatrixView, Side, matrix_view
from galore_jax.views.targets import Targets, all_matrices, exemption, is_target

RankLike = int | float | Callable[[str, Any], int | float | None]

NEEDS_AXES = "more than two axes: needs `axes`"


@dataclasses.dataclass(frozen=True)
class Rules:
    """The part of a lens configuration that decides which leaves are projected, and how."""

    rank: RankLike
    side: Side
    axes: AxesRule
    targets: Targets


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """The decision for one leaf.

    Args:
      path: "/"-joined path in the parameter tree.
      shape: Shape of the leaf.
      dtype: Its dtype.
      view: How it is seen as matrices; None if it is not projected.
      rank: Effective rank; 0 if it is not projected.
      reason: One phrase saying why it is projected, or why not.
      is_matrix: Whether it could be projected: `targets` take it, and two axes are longer than one.
      limit: Projected dimension that the rank reaches; 0 if it is not that which excludes it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    view: MatrixView | None
    rank: int
    reason: str
    is_matrix: bool = False
    limit: int = 0

    @functools.cached_property
    def is_projected(self) -> bool:
        return self.view is not None

    @functools.cached_property
    def batch_shape(self) -> tuple[int, ...]:
        """Of its bases; no axes if it is not projected."""
        return self.view.batch_shape if self.view else ()

    @functools.cached_property
    def is_inexact(self) -> bool:
        """Whether the inner transformation sees this leaf at all."""
        return jnp.issubdtype(self.dtype, jnp.inexact)


def leaf_plan(config: Rules, params: Any) -> list[LeafPlan]:
    """Plans every leaf of `params`, in flattening order.

    Args:
      config: The config of a lens, or its rules alone.
      params: Parameters, gradients or `ShapeDtypeStruct`s; only shapes and dtypes are read.

    Returns:
      One `LeafPlan` per leaf.

    Raises:
      ValueError: Axes that do not exist in a leaf, an `axes` tree of another structure, an
        integer or complex leaf that was asked to be projected, or a rank that is not positive.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> params = {"w": jnp.zeros((64, 32)), "b": jnp.zeros((32,))}
      >>> tx = gj.low_rank_projection(gj.scale_by_factored_rms(), rank=8)
      >>> config = tx.init(params).config
      >>> [(leaf.path, leaf.rank) for leaf in gj.views.leaf_plan(config, params)]
      [('b', 0), ('w', 8)]
    """
    leaves = Leaves.of(params)
    if not leaves.values:
        return []  # optax.tree.map_params calls `init` with such a tree
    requests = _axes_requests(config.axes, leaves.tree(leaves.shapes), leaves.paths)
    return [
        _plan_leaf(config, *leaf)
        for leaf in zip(leaves.paths, leaves.shapes, requests, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class _Request:
    """Axes asked for one leaf, and how firmly."""

    axes: MatrixAxes | None
    # Named leaf by leaf (a tree): takes part unless `targets` says otherwise.
    explicit: bool = False
    # Where the axes came from nowhere: only a two-axis leaf is unmistakably a matrix.
    default: bool = False


def _axes_requests(rule: AxesRule, params: Any, paths: list[str]) -> list[_Request]:
    if rule is None:
        return [_Request(MatrixAxes(), default=True)] * len(paths)
    if isinstance(rule, MatrixAxes):
        return [_Request(rule)] * len(paths)
    if isinstance(rule, AxesByPath):
        names = dict(rule.rules)
        if set(paths) <= set(names):  # the parameters themselves, leaf by leaf (some masked)
            return [_Request(names[path], explicit=True) for path in paths]
        matches = [[a for pattern, a in rule.rules if re.search(pattern, p)] for p in paths]
        return [_Request(m[0]) if m else _Request(MatrixAxes(), default=True) for m in matches]
    if isinstance(rule, AxesTree):
        return [_Request(axes, explicit=own) for axes, own in axes_per_leaf(rule, params)]
    return _axes_requests(axes_rule(rule(params)), params, paths)


def _plan_leaf(config: Rules, path: str, like: jax.ShapeDtypeStruct, request: _Request) -> LeafPlan:
    shape, dtype = like.shape, like.dtype
    axes, targets = request.axes, config.targets
    is_real = jnp.issubdtype(dtype, jnp.floating)
    is_matrix = is_real and sum(size > 1 for size in shape) > 1

    def full_size(reason: str, is_matrix: bool = False, limit: int = 0) -> LeafPlan:
        return LeafPlan(path, shape, dtype, None, 0, reason, is_matrix, limit)

    if 0 in shape:
        return full_size("empty")
    if axes is None:
        return full_size("axes say None", is_matrix and is_target(targets, path, like))
    if len(shape) < 2 and not request.explicit:
        return full_size("fewer than two axes")
    if targets is None:
        exempt = None if request.explicit else exemption(path, shape)
    else:
        exempt = None if is_target(targets, path, like) else "not in targets"
    if exempt is not None:
        return full_size(exempt)
    if not is_real:
        if request.explicit or targets not in (None, all_matrices):
            raise ValueError(
                f"leaf {path!r} has dtype {jnp.dtype(dtype).name}: only real floating-point leaves "
                "can be projected. Leave it out of `targets` and `axes`."
            )
        return full_size("not a real floating-point leaf")
    if request.default and len(shape) > 2:
        return full_size(NEEDS_AXES, is_matrix)
    try:
        view = matrix_view(shape, axes, config.side)
    except ValueError as error:
        raise ValueError(f"leaf {path!r}: {error}") from error
    asked = asked_rank(config.rank, path, like)
    if asked is None:
        return full_size("the rank callable says None", is_matrix)
    rank, limit = effective_rank(asked, view), view.projected_size
    if rank >= limit:
        reason = f"rank {asked} reaches the projected dimension {limit}"
        return full_size(reason, limit > 1, limit)
    return LeafPlan(path, shape, dtype, view, rank, "projected", True)


def rank_rule(rank: Any) -> int | float | Rule:
    """The `rank` argument, checked, as something static: hashable and comparable."""
    return Rule.of("rank", rank) if callable(rank) else _number(rank)


def _number(rank: Any) -> int | float:
    if isinstance(rank, jax.Array):
        raise TypeError(
            "`rank` is a JAX array, but it fixes shapes and must be a plain Python number. Under "
            "optax.inject_hyperparams pass static_args=galore_jax.STATIC_ARGS."
        )
    is_float = isinstance(rank, float)
    if isinstance(rank, bool | np.bool) or not (is_float or hasattr(rank, "__index__")):
        raise TypeError(
            f"`rank` must be an int, a float fraction or a callable(path, leaf), got {rank!r}."
        )
    if is_float and not 0 < rank <= 1:
        raise ValueError(
            f"a float `rank` is a fraction of the projected dimension, in (0, 1]; got {rank}."
        )
    if rank <= 0:
        raise ValueError(f"`rank` must be positive, got {rank}.")
    return float(rank) if is_float else operator.index(rank)


def asked_rank(rank: RankLike, path: str, like: jax.ShapeDtypeStruct) -> int | float | None:
    """The rank that is asked for one leaf: a number, a fraction, or None for no projection."""
    if not callable(rank):
        return rank
    chosen = rank(path, like)
    try:
        return None if chosen is None else _number(chosen)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"leaf {path!r}: the rank callable returned {chosen!r}. {error}"
        ) from error


def effective_rank(asked: int | float, view: MatrixView) -> int:
    """The columns of a basis, for the rank that is asked for."""
    if isinstance(asked, float):
        asked = max(1, round(asked * view.projected_size))
    return min(int(asked), view.kept_size, view.projected_size)
