"""Options of a lens that have no effect, told when it is initialised."""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax

from galore_jax.views.axes import AxesByPath, MatrixAxes
from galore_jax.views.matrix_view import MatrixView, matrix_view
from galore_jax.views.plan import NEEDS_AXES, LeafPlan, ViewRules, asked_rank, effective_rank
from galore_jax.views.targets import patterns

_ENTRIES = 1024  # of a matrix; smaller ones are not worth a warning
_LINES = 6  # of an example
_STACK, _INTO_HEADS = MatrixAxes(-2, -1), MatrixAxes(-3, (-2, -1))
_FROM_HEADS = MatrixAxes((-3, -2), -1)
_LIBRARIES = ("galore_jax", "optax", "jax", "flax")


def check_projection(
    plans: list[LeafPlan], rules: ViewRules, *, part: bool = False, said: set[str] | None = None
) -> None:
    """Raises if nothing is projected by mistake, and warns of options without effect.

    Silent about what was chosen: leaves that a callable or an entry None leaves out, ranks that
    reach only some of the leaves, and models without a matrix that `targets` take.

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
    if not any(len(plan.shape) > 1 for plan in plans):
        return
    paths, targets = [plan.path for plan in plans], patterns(rules.targets)
    keys = [key for key, _ in rules.axes.rules] if isinstance(rules.axes, AxesByPath) else []
    unmatched = [] if part else list(_unmatched("targets", targets, paths))
    is_error = 0 < len(targets) == len(unmatched)
    notes = unmatched + ([] if part else list(_unmatched("axes", keys, paths)))
    readings = list(_readings(plans, rules))
    needing = [leaf for leaf in readings if leaf.fits]
    if any(plan.is_projected for plan in plans):
        needing = [leaf for leaf in needing if leaf.entries >= _ENTRIES]
    else:
        limits = [plan.limit for plan in plans if plan.limit > 1]
        limits += [leaf.view.projected_size for leaf in readings if not leaf.fits]
        if limits or needing:
            is_error = not part
            notes.append(f"none of the {len(limits) + len(needing)} matrices is projected.")
        if limits:
            notes.append(_rank_reaches(rules, limits, len(needing)))
    if needing:
        notes.append(_needs_axes(needing, rules))
    if is_error:
        raise ValueError("\n".join(notes))
    new = [note for note in notes if said is None or note not in said]
    if new:
        warnings.warn("\n".join(new), UserWarning, stacklevel=_level_of_the_user())
    if said is not None:
        said.update(new)


class _Reading(NamedTuple):
    """A leaf with more than two axes, and a guess which of them form its matrix."""

    plan: LeafPlan
    axes: MatrixAxes
    view: MatrixView
    rank: int

    @property
    def fits(self) -> bool:
        return self.rank < self.view.projected_size

    @property
    def entries(self) -> int:
        return self.view.kept_size * self.view.projected_size


def _readings(plans: list[LeafPlan], rules: ViewRules) -> Iterator[_Reading]:
    """Readings of the leaves that need `axes`, unless the rank callable excludes them."""
    for plan in plans:
        if plan.reason != NEEDS_AXES or not plan.is_matrix:
            continue
        asked = asked_rank(rules.rank, plan.path, jax.ShapeDtypeStruct(plan.shape, plan.dtype))
        if asked is None:
            continue
        readings = []
        for axes in dict.fromkeys((_guess(plan), _STACK, _INTO_HEADS, _FROM_HEADS)):
            view = matrix_view(plan.shape, axes, rules.side)
            readings.append(_Reading(plan, axes, view, effective_rank(asked, view)))
        likely = [reading for reading in readings if reading.fits]
        yield likely[0] if likely else max(readings, key=lambda r: r.view.projected_size)


def _guess(plan: LeafPlan) -> MatrixAxes:
    stacked = re.search(r"(^|/)(\w*layers|\w*blocks|h)/(?!\d)", plan.path) is not None
    first, second, third = plan.shape[-3:]
    name = r"(^|[/_.])({})(_proj)?([/.](kernel|weight|w|value))*$"
    if len(plan.shape) - stacked > 2:
        into, out_of = name.format("q|k|v|query|key|value"), name.format("o|out|wo")
        if re.search(into, plan.path) or first == second * third:
            return _INTO_HEADS
        if re.search(out_of, plan.path) or first * second == third:
            return _FROM_HEADS
    return _STACK


def _needs_axes(leaves: list[_Reading], rules: ViewRules) -> str:
    """The line to write, with a guess for each kind of leaf."""
    entries: dict[str, str] = {}
    for plan, axes, view, _ in leaves:
        path = re.sub(r"(?<![^\W_])\d+", r"\\d+", re.escape(plan.path))
        key = f'r"{path}"' if "\\" in path else f'"{path}"'
        entry = f"    {key}: gj.MatrixAxes({axes.reduction_axis}, {axes.output_axis}),"
        sizes = (view.projected_size, view.kept_size)
        rows, columns = sizes if view.projects_input else sizes[::-1]
        entries[entry] = f"{entry}  # {plan.shape}: {view.num_matrices} x [{rows}, {columns}]"
    shown = list(entries.values())
    more = [f"    # and {len(shown) - _LINES} more"] if len(shown) > _LINES else []
    lines = ["axes={", *shown[:_LINES], *more, "}"]
    if rules.axes is None and all(leaf.axes == _STACK for leaf in leaves):
        lines.append("or, for all of them, axes=gj.MatrixAxes(-2, -1)")
    return "\n".join(
        [
            f"{len(leaves)} of the leaves have more than two axes and stay at full size. Say which "
            "axes form the matrices, inputs first; if this guess is right,",
            *lines,
        ]
    )


def _rank_reaches(rules: ViewRules, limits: list[int], others: int) -> str:
    rank = "the rank callable" if callable(rules.rank) else f"rank {rules.rank}"
    which = f"{len(limits)} of them" if others else "all of them"
    advice = f"rank < {max(limits)}, e.g. rank={max(1, max(limits) // 4)} or rank=0.25"
    return (
        f"{rank} reaches the projected dimension of {which} (the largest is {max(limits)}). "
        f"Choose {advice}."
    )


def _unmatched(option: str, given: Iterable[str], paths: list[str]) -> Iterator[str]:
    """Patterns that match no leaf."""
    for pattern in given:
        if pattern not in paths and not any(re.search(pattern, path) for path in paths):
            (closest,) = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)
            yield f"`{option}`: {pattern!r} matches no leaf; the closest path is {closest!r}."


def _level_of_the_user() -> int:
    """The `stacklevel`, for a warning of the caller, of the code that uses the optimizer."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level
