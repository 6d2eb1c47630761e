"""The `axes` argument: the axes of a leaf that form its matrix."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax

from galore_jax.leaves import Leaves
from galore_jax.rules import Rule
from galore_jax.views.targets import check_regex

Axes = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """The axes of a leaf that form its matrix; every axis not named is a batch axis.

    A leaf becomes a batch of matrices ``[*batch, reduction, output]``; several axes on one side
    are flattened together in the order given. Each matrix of the batch gets its own basis.

    Args:
      reduction_axis: Axis or axes that the forward product contracts (a kernel's inputs).
      output_axis: Axis or axes that the forward product produces (a kernel's outputs).

    Raises:
      ValueError: An axis is named twice, or a side is empty.
      TypeError: An axis is not an integer.

    Example:
      >>> import galore_jax as gj
      >>> gj.MatrixAxes()              # a stack of layers, [layers, in, out]
      MatrixAxes(reduction_axis=-2, output_axis=-1)
      >>> gj.MatrixAxes(0, (1, 2))     # attention, [embed, heads, head_dim]
      MatrixAxes(reduction_axis=0, output_axis=(1, 2))
    """

    reduction_axis: Axes = -2
    output_axis: Axes = -1

    def __post_init__(self):
        object.__setattr__(self, "reduction_axis", _as_axes(self.reduction_axis))
        object.__setattr__(self, "output_axis", _as_axes(self.output_axis))
        named = as_tuple(self.reduction_axis) + as_tuple(self.output_axis)
        if len(set(named)) != len(named):
            raise ValueError(f"{self} names an axis twice; each axis belongs to one side only.")


def as_tuple(axes: Axes) -> tuple[int, ...]:
    """One axis or several, as a tuple."""
    return (axes,) if isinstance(axes, int) else axes


def _as_axes(axes: Any) -> Axes:
    several = isinstance(axes, tuple | list)
    given = tuple(axes) if several else (axes,)
    if any(isinstance(axis, bool) or not hasattr(axis, "__index__") for axis in given):
        raise TypeError(f"MatrixAxes takes integers or tuples of integers, got {axes!r}.")
    if not given:
        raise ValueError("MatrixAxes needs at least one axis on each side, got an empty tuple.")
    normalised = tuple(map(operator.index, given))
    return normalised if several else normalised[0]


def is_axes(node: Any) -> bool:
    """Whether `node` names matrix axes: ours, or optax's dimension numbers."""
    return hasattr(node, "reduction_axis") and hasattr(node, "output_axis")


def _is_axes_or_none(node: Any) -> bool:
    return node is None or is_axes(node)


def _as_matrix_axes(node: Any) -> MatrixAxes | None:
    if node is None or isinstance(node, MatrixAxes):
        return node
    if is_axes(node):
        return MatrixAxes(node.reduction_axis, node.output_axis)
    raise TypeError(
        f"`axes` holds {node!r} where a MatrixAxes (or None for `do not project`) was expected."
    )


@dataclasses.dataclass(frozen=True)
class AxesTree:
    """A pytree of MatrixAxes in hashable form, so that it can be part of a static config."""

    treedef: Any
    leaves: tuple[MatrixAxes | None, ...]


@dataclasses.dataclass(frozen=True)
class AxesByPath:
    """Regex on the leaf path -> MatrixAxes; the first match wins."""

    rules: tuple[tuple[str, MatrixAxes | None], ...]


AxesRule = MatrixAxes | AxesTree | AxesByPath | Callable[[Any], Any] | None


def axes_rule(axes: Any) -> AxesRule:
    """Normalises the `axes` argument into something static: hashable and comparable."""
    if axes is None:
        return None
    if is_axes(axes):
        return _as_matrix_axes(axes)
    if isinstance(axes, Mapping) and all(
        isinstance(key, str) and _is_axes_or_none(value) for key, value in axes.items()
    ):
        for key in axes:
            check_regex("axes", key)
        return AxesByPath(tuple((key, _as_matrix_axes(value)) for key, value in axes.items()))
    leaves, treedef = jax.tree.flatten(axes, is_leaf=_is_axes_or_none)
    # A tree may be callable, like a module of Equinox.
    if callable(axes) and not (leaves and all(map(_is_axes_or_none, leaves))):
        return Rule.of("axes", axes)
    return AxesTree(treedef, tuple(_as_matrix_axes(leaf) for leaf in leaves))


def axes_per_leaf(tree: AxesTree, params: Any) -> list[tuple[MatrixAxes | None, bool]]:
    """Per leaf of `params` its entry, and whether that is its own or that of a subtree above it."""
    try:
        subtrees = tree.treedef.flatten_up_to(params)
    except (ValueError, TypeError):
        # Not chained: jax's message prints the arrays.
        raise ValueError(
            "the `axes` tree does not match the parameter tree: axes have the structure "
            f"{tree.treedef}, parameters {jax.tree.structure(params)}. Give `axes` the structure "
            "of the parameters (or a prefix of it), with None where a leaf is not to be projected; "
            "or use a {path regex: MatrixAxes} dict."
        ) from None
    entries: list[tuple[MatrixAxes | None, bool]] = []
    for axes, subtree in zip(tree.leaves, subtrees, strict=True):
        paths = Leaves.of(subtree).paths
        entries += [(axes, paths == [""])] * len(paths)
    return entries
