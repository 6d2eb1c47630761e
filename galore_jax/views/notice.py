"""Options of a lens that have no effect, told when it is initialised."""

from __future__ import annotations

import difflib
import math
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax

from galore_jax.views.axes import AxesByPath, MatrixAxes
from galore_jax.views.matrix_view import MatrixView, matrix_view
from galore_jax.views.plan import NEEDS_AXES, LeafPlan, Rules, asked_rank, effective_rank
from galore_jax.views.targets import patterns

_ENTRIES = 1024  # of a matrix; smaller ones are not worth a warning
_LINES = 6  # of an example
_STACK, _INTO_HEADS = MatrixAxes(-2, -1), MatrixAxes(-3, (-2, -1))
_FROM_HEADS = MatrixAxes((-3, -2), -1)
_LIBRARIES = ("galore_jax", "optax", "jax", "flax")


def check_projection(
    plans: list[LeafPlan], rules: Rules, *, part: bool = False, said: set[str] | None = None
) -> None:
    """Raises if nothing is projected by mistake, and warns of options without effect.

    Silent about what was chosen: leaves that a callable or an entry None leaves out, ranks that
    reach only some of the leaves, rank=1.0, and models without a matrix that `targets` take, or
    with tiny ones only.

    Args:
      plans: Plans of all leaves that the lens sees.
      rules: Its options.
      part: Whether it sees a part of the model only, under `optax.masked` or `optax.partition`. A
        pattern may be meant for the rest then, and nothing is an error.
      said: Warnings that were given before. They are not given again, and new ones are added.

    Raises:
      ValueError: No leaf is projected, although some are matrices that `targets` take, or because
        `targets` match no leaf.
    """
    if not any(len(plan.shape) > 1 and math.prod(plan.shape[-2:]) >= _ENTRIES for plan in plans):
        return
    targets, axes = patterns(rules.targets), rules.axes
    keys = [key for key, _ in axes.rules] if isinstance(axes, AxesByPath) else []
    unmatched = [] if part else list(_unmatched("targets", targets, plans))
    notes = unmatched + ([] if part else list(_unmatched("axes", keys, plans)))
    is_error = 0 < len(targets) == len(unmatched)

    unread = [plan for plan in plans if plan.reason == NEEDS_AXES and plan.is_matrix]
    readings = [_reading(plan, rules) for plan in unread]
    needing = [leaf for leaf in readings if 0 < leaf.rank < leaf.limit]
    limits = [leaf.limit for leaf in readings if 1 < leaf.limit <= leaf.rank]
    limits += [plan.limit for plan in plans if plan.limit > 1]
    if isinstance(rules.rank, float) and rules.rank == 1:
        limits = []  # all of every matrix
    if any(plan.is_projected for plan in plans):
        needing = [leaf for leaf in needing if leaf.entries >= _ENTRIES]
        notes += [_needs_axes(needing, rules)] if needing else []
    elif limits or needing:
        is_error = not part
        why = [_rank_reaches(rules, limits, bool(needing))] if limits else []
        why += [_needs_axes(needing, rules)] if needing else []
        count = len(limits) + len(needing)
        notes.append(f"none of the {count} matrices is projected: {' '.join(why)}")
    if is_error:
        raise ValueError("\n".join(notes))
    new = [note for note in notes if said is None or note not in said]
    if new:
        warnings.warn("\n".join(new), UserWarning, stacklevel=_level_of_the_user())
    if said is not None:
        said.update(new)


class _Reading(NamedTuple):
    """A leaf with more than two axes, read as matrices as is most likely.

    Args:
      plan: Its plan.
      axes: Axes that may form its matrix.
      view: The view that they give.
      rank: Its rank then; 0 if the rank callable excludes it.
    """

    plan: LeafPlan
    axes: MatrixAxes
    view: MatrixView
    rank: int

    @property
    def limit(self) -> int:
        return self.view.projected_size

    @property
    def entries(self) -> int:
        return self.view.kept_size * self.view.projected_size


def _reading(plan: LeafPlan, rules: Rules) -> _Reading:
    """The first reading that is projected; or that with the longest projected dimension."""
    asked = asked_rank(rules.rank, plan.path, jax.ShapeDtypeStruct(plan.shape, plan.dtype))
    readings = []
    for axes in (_guess(plan), _STACK, _INTO_HEADS, _FROM_HEADS):
        view = matrix_view(plan.shape, axes, rules.side)
        rank = 0 if asked is None else effective_rank(asked, view)
        readings.append(_Reading(plan, axes, view, rank))
    longest = max(readings, key=lambda leaf: leaf.limit)
    return next((leaf for leaf in readings if leaf.rank < leaf.limit), longest)


def _guess(plan: LeafPlan) -> MatrixAxes:
    """The axes of a projection into or out of heads, by name or sizes; else those of a stack."""
    stacked = re.search(r"(^|/)(\w*layers|\w*blocks|h)/(?!\d)", plan.path) is not None
    first, second, third = plan.shape[-3:]
    name = r"(^|[/_.])({})(_proj)?([/.](kernel|weight|w|value))*$"
    if len(plan.shape) - stacked > 2:
        if re.search(name.format("[qkv]|query|key|value"), plan.path) or first == second * third:
            return _INTO_HEADS
        if re.search(name.format("o|out|wo"), plan.path) or first * second == third:
            return _FROM_HEADS
    return _STACK


def _needs_axes(leaves: list[_Reading], rules: Rules) -> str:
    """The lines to write, one for each kind of leaf."""
    entries: dict[str, str] = {}
    for plan, axes, view, _ in leaves:
        pattern = re.sub(r"(?<![^\W_])\d+", r"\\d+", re.escape(plan.path))
        raw = "r" if "\\" in pattern else ""
        line = f'    {raw}"{pattern}": gj.MatrixAxes({axes.reduction_axis}, {axes.output_axis}),'
        sizes = (view.projected_size, view.kept_size)[:: 1 if view.projects_input else -1]
        entries[line] = f"{line}  # {plan.shape} as {view.num_matrices} x {list(sizes)}"
    lines, more = list(entries.values())[:_LINES], len(entries) - _LINES
    lines += [f"    # and {more} more"] * (more > 0)
    return "\n".join(
        [
            f"{len(leaves)} of the leaves have more than two axes and stay at full size. Say which "
            "axes form the matrices, inputs first; if this guess is right, write",
            *("axes={", *lines, "}"),
            *["or axes=gj.MatrixAxes(-2, -1) for all of them"]
            * (rules.axes is None and all(leaf.axes == _STACK for leaf in leaves)),
        ]
    )


def _rank_reaches(rules: Rules, limits: list[int], is_part: bool) -> str:
    rank = "the rank callable" if callable(rules.rank) else f"rank {rules.rank}"
    which, most = f"{len(limits)} of them" if is_part else "all of them", max(limits)
    return (
        f"{rank} reaches the projected dimension of {which} (the largest is {most}). "
        f"Choose rank < {most}, e.g. rank={max(1, most // 4)} or rank=0.25."
    )


def _unmatched(option: str, given: Iterable[str], plans: list[LeafPlan]) -> Iterator[str]:
    """Patterns that match no leaf."""
    paths = [plan.path for plan in plans]
    for pattern in given:
        if pattern not in paths and not any(re.search(pattern, path) for path in paths):
            (closest,) = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)
            yield f"`{option}`: {pattern!r} matches no leaf; the closest path is {closest!r}."


def _level_of_the_user() -> int:
    """The `stacklevel` of the code that uses the optimizer, for a warning of the caller."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level
