"""The static decision for every leaf: its path, its matrix view, its rank, and why."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from galore_jax.views.axes import (
    AxesByPath,
    AxesRule,
    AxesTree,
    MatrixAxes,
    axes_per_leaf,
    axes_rule,
)
from galore_jax.views.leaves import abstract, flatten_leaves, leaf_paths
from galore_jax.views.matrix_view import MatrixView, Side, matrix_view
from galore_jax.views.targets import Targets, all_matrices, is_target

RankLike = int | float | Callable[[str, Any], int | float | None]


class ViewRules(Protocol):
    """The part of a lens configuration that decides which leaves are projected, and how."""

    @property
    def rank(self) -> RankLike: ...
    @property
    def side(self) -> Side: ...
    @property
    def axes(self) -> AxesRule: ...
    @property
    def targets(self) -> Targets: ...


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules alone, for planning without a lens."""

    rank: RankLike
    side: Side
    axes: AxesRule
    targets: Targets


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What happens to one leaf.

    Args:
      path: "/"-joined path in the parameter tree.
      shape: Shape of the leaf.
      dtype: Its dtype.
      view: How it is seen as matrices; None if it is not projected.
      rank: Effective rank; 0 if it is not projected.
      reason: One phrase saying why it is projected, or why not.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    view: MatrixView | None
    rank: int
    reason: str

    @property
    def is_projected(self) -> bool:
        return self.view is not None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Of its bases; no axes if it is not projected."""
        return self.view.batch_shape if self.view else ()

    @property
    def is_inexact(self) -> bool:
        """Whether the inner transformation sees this leaf at all."""
        return jnp.issubdtype(self.dtype, jnp.inexact)


def leaf_plan(config: ViewRules, params: Any) -> list[LeafPlan]:
    """Plans every leaf of `params`, in flattening order.

    Args:
      config: Rules of a lens (any object with `rank`, `side`, `axes`, `targets`).
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
    leaves, _ = flatten_leaves(params)
    if not leaves:
        return []  # optax.tree.map_params calls `init` with such a tree
    paths = leaf_paths(params)
    requests = _axes_requests(config.axes, params, paths)
    return [
        _plan_leaf(config, path, abstract(leaf), leaf, request)
        for path, leaf, request in zip(paths, leaves, requests, strict=True)
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
        return [_by_path(rule, path) for path in paths]
    if isinstance(rule, AxesTree):
        return [_Request(axes, explicit=own) for axes, own in axes_per_leaf(rule, params)]
    return _axes_requests(axes_rule(rule(params)), params, paths)


def _by_path(rule: AxesByPath, path: str) -> _Request:
    for pattern, axes in rule.rules:
        if re.search(pattern, path):
            return _Request(axes)
    return _Request(MatrixAxes(), default=True)


def _plan_leaf(
    config: ViewRules, path: str, like: jax.ShapeDtypeStruct, leaf: Any, request: _Request
) -> LeafPlan:
    shape, dtype = like.shape, like.dtype

    def full_rank(reason: str) -> LeafPlan:
        return LeafPlan(path, shape, dtype, None, 0, reason)

    axes, targets = request.axes, config.targets
    if 0 in shape:
        return full_rank("empty")
    if axes is None:
        return full_rank("axes say None")
    if len(shape) < 2 and not request.explicit:
        return full_rank("fewer than two axes")
    if not (request.explicit and targets is None) and not is_target(targets, path, leaf):
        return full_rank("embedding, head, norm or bias" if targets is None else "not in targets")
    if not jnp.issubdtype(dtype, jnp.floating):
        if request.explicit or targets not in (None, all_matrices):
            raise ValueError(
                f"leaf {path!r} has dtype {jnp.dtype(dtype).name}: only real floating-point leaves "
                "can be projected. Leave it out of `targets` and `axes`."
            )
        return full_rank("not a real floating-point leaf")
    if request.default and len(shape) > 2:
        return full_rank("more than two axes: needs `axes`")
    try:
        view = matrix_view(shape, axes, config.side)
    except ValueError as error:
        raise ValueError(f"leaf {path!r}: {error}") from error
    rank = _effective_rank(config.rank, path, leaf, view)
    if rank is None:
        return full_rank("the rank callable says None")
    if rank >= view.projected_size:
        return full_rank(f"rank {rank} reaches the projected dimension")
    return LeafPlan(path, shape, dtype, view, rank, "projected")


def check_rank(rank: Any) -> None:
    """Raises unless `rank` is a positive int, a fraction in (0, 1], or a callable."""
    if callable(rank):
        return
    if isinstance(rank, jax.Array):
        raise TypeError(
            "`rank` is a JAX array, but it fixes shapes and must be a plain Python number. Under "
            "optax.inject_hyperparams pass static_args=galore_jax.STATIC_ARGS."
        )
    if isinstance(rank, bool) or not (isinstance(rank, float) or hasattr(rank, "__index__")):
        raise TypeError(
            f"`rank` must be an int, a float fraction or a callable(path, leaf), got {rank!r}."
        )
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(
            f"a float `rank` is a fraction of the projected dimension, in (0, 1]; got {rank}."
        )
    if rank <= 0:
        raise ValueError(f"`rank` must be positive, got {rank}.")


def _effective_rank(rank: RankLike, path: str, leaf: Any, view: MatrixView) -> int | None:
    if callable(rank):
        chosen = rank(path, leaf)
        if chosen is None:
            return None
        try:
            check_rank(chosen)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"leaf {path!r}: the rank callable returned {chosen!r}. {error}"
            ) from error
        return _effective_rank(chosen, path, leaf, view)
    if isinstance(rank, float):
        rank = max(1, round(rank * view.projected_size))
    return min(int(rank), view.kept_size, view.projected_size)
