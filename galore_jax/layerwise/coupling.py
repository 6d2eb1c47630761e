"""A check that one block can be updated before the gradients of the others exist.

Its update is traced on one layer, and followed without looking at the arithmetic: an operation
depends on all of its operands. Layers of one leaf cannot meet, because there is only one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from galore_jax.layerwise.slices import Layer, LayerAxes, check_unchanged, parts, paths_of
from galore_jax.leaves import Leaves, unboxed
from galore_jax.transforms import AccumulateState, LowRankState
from galore_jax.transforms.state import low_rank_states
from galore_jax.transforms.state_tree import lens_on, likes_of
from galore_jax.views import LeafPlan

_REMEDIES = (
    "A layer-wise step updates a block before the other gradients exist. Instead of "
    "optax.clip_by_global_norm pass clip_norm= to train_step (exact; passes the blocks backwards "
    "twice), or chain layerwise.clip_by_previous_norm (at no cost). Instead of "
    "optax.apply_if_finite leave skip_nonfinite=True. Anything else needs an ordinary step."
)

# Numbers of leaves, of other arrays behind them, and these.
Numbers = frozenset[int]
_NONE: Numbers = frozenset()
_LAYER, _NORM, _RANDOM = -1, -2, -3
_DRAWS = ("random_", "rng_", "threefry")


class Reads(NamedTuple):
    """Numbers of the leaves whose gradients enter the results of an update.

    Another number stands for the global norm of the step.

    Args:
      updates: Per leaf of the updates.
      state: Per array of the new state.
      dates: Per array of the new state, whether it says that a basis is due, or new in a window.
    """

    updates: list[Numbers]
    state: list[Numbers]
    dates: list[bool]


def dependence(jaxpr: core.Jaxpr, inputs: Sequence[Numbers]) -> list[Numbers]:
    """The union of the inputs that every result of a program depends on.

    Args:
      jaxpr: The program; its constants depend on nothing.
      inputs: The numbers of every argument.

    Returns:
      Per result its numbers; those of random numbers without the number of the layer in their key
      contain one that says so.
    """
    known: dict[Any, Numbers] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atoms: Iterable[Any]) -> list[Numbers]:
        return [known.get(x, _NONE) if isinstance(x, core.Var) else _NONE for x in atoms]

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _results(eqn, read(eqn.invars)), strict=True))
    return read(jaxpr.outvars)


def _results(eqn: Any, operands: list[Numbers]) -> list[Numbers]:
    name, bodies = eqn.primitive.name, list(_bodies(eqn))
    if name == "cond":
        which, *arguments = operands
        branches = [dependence(body, arguments) for body in bodies]
        return [which.union(*branch) for branch in zip(*branches, strict=True)]
    if name == "optimization_barrier":
        return operands
    if name not in ("scan", "while") and [len(body.invars) for body in bodies] == [len(operands)]:
        return dependence(bodies[0], operands)
    mixed = _NONE.union(*operands)
    for body in bodies:
        mixed = mixed.union(*dependence(body, [mixed] * len(body.invars)))
    if name.startswith(_DRAWS):
        mixed = mixed - {_RANDOM} if _LAYER in mixed else mixed | {_RANDOM}
    return [mixed] * len(eqn.outvars)


def _bodies(eqn: Any) -> Iterable[core.Jaxpr]:
    """The programs inside an operation."""
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            body = part.jaxpr if isinstance(part, core.ClosedJaxpr) else part
            if isinstance(body, core.Jaxpr):
                yield body


def reads_of(
    traced: jax.stages.Traced, here: Layer, gradients: Any, axes: LayerAxes, inside: list[bool]
) -> Reads:
    """The gradients that an update reads, after a check that layers can be updated one by one.

    Args:
      traced: ``(layer, norm, gradients, opt_state, params) -> (updates, opt_state)``.
      here: Parameters and state of one layer, as it was traced with.
      gradients: Likewise.
      axes: The layer axes of parameters and state.
      inside: Per leaf of the parameters, whether it is in the blocks.

    Raises:
      ValueError: An update or state of a block depends on the gradient of anything else, or vice
        versa; names both. Or results do not have the shapes of one layer.
    """
    updates, state = traced.out_info
    check_unchanged(here.opt_state, state)
    leaves = Leaves.of(here.params)
    paths, changes = leaves.paths, leaves.split(unboxed(updates))
    _check_shapes(leaves, changes)
    _check_layer_is_used(here, inside, traced.jaxpr.jaxpr)

    dates = _dates(state)
    stacked = [axis is not None for axis in axes.axes]
    arrays = len(parts(here.params))
    own_arrays, own_state = stacked[:arrays], stacked[arrays:]
    # Of state and parameters, what differs from layer to layer is nothing to read from outside;
    # except that any basis is due, which says that all of them are looked at.
    hidden = [own and not date for own, date in zip(own_state, dates, strict=True)]
    states = [f"the state {name!r}" for name in paths_of(state)]
    names = [*map(repr, paths), *states, *(f"the parameter {p!r}" for p in paths_of(here.params))]
    others = enumerate([*hidden, *own_arrays], len(paths))
    found = dependence(
        traced.jaxpr.jaxpr,
        [
            frozenset([_LAYER]),
            frozenset([_NORM]),
            *(frozenset([n]) for n, g in enumerate(Leaves.of(gradients).values) for _ in parts(g)),
            *(frozenset([n]) if own else _NONE for n, own in others),
        ],
    )
    results = iter(found)
    of_updates = [_NONE.union(*(next(results) for _ in parts(x))) for x in changes]
    of_state = list(results)
    subjects = [f"the update of {path!r}" for path in paths] + states
    for subject, own, numbers in zip(
        subjects, [*inside, *own_state], [*of_updates, *of_state], strict=True
    ):
        if problem := _problem(numbers, own, inside, names):
            raise ValueError(f"{subject} depends on {problem}. {_REMEDIES}")
    known = frozenset([_NORM, *range(len(paths))])
    return Reads(
        updates=[numbers & known for numbers in of_updates],
        state=[numbers & known for numbers in of_state],
        dates=dates,
    )


def _problem(numbers: Numbers, own: bool, inside: list[bool], names: list[str]) -> str | None:
    """Anything that a result must not depend on, if it is `own` to a block, or if it is not."""
    known = sorted(n for n in numbers if n >= 0)
    if own:
        if foreign := [names[n] for n in known if n < len(inside) and not inside[n]]:
            return f"the gradient of {_listed(foreign)}, outside the blocks"
        if _RANDOM in numbers:
            return (
                "random numbers that are the same for every layer. Derive their key from the "
                "extra argument `layer` of update"
            )
        if _NORM in numbers:
            return "the global norm of this step (the extra argument `grad_norm` of update)"
        return None
    foreign = [names[n] for n in known if n >= len(inside) or inside[n]]
    return f"{_listed(foreign)}, which is in the blocks" if foreign else None


def _listed(names: list[str]) -> str:
    first, *rest = names
    return first + (f" (and {len(rest)} more)" if rest else "")


def _dates(state: Any) -> list[bool]:
    """Per array of a state, whether it says that a basis is to be refreshed, or has been."""

    def marked(tree: Any) -> Any:
        return jax.tree.map(mark, tree, is_leaf=lambda node: isinstance(node, known))

    def mark(node: Any) -> Any:
        marks = jax.tree.map(lambda _: False, node)
        if isinstance(node, LowRankState):
            due = jax.tree.map(lambda _: True, node.refresh_state.due)
            return marks._replace(refresh_state=marks.refresh_state._replace(due=due))
        if isinstance(node, AccumulateState):
            moved = jax.tree.map(lambda _: True, node.moved)
            return marks._replace(moved=moved, opt_state=marked(node.opt_state))
        return marks

    known = (LowRankState, AccumulateState)
    return jax.tree.leaves(marked(state))


def _check_shapes(params: Leaves, updates: list[Any]) -> None:
    """Raises if an update has grown: by an array for all layers, in the transformation itself."""
    for path, like, update in zip(params.paths, params.shapes, updates, strict=True):
        if parts(update) and jnp.shape(update) != like.shape:
            raise ValueError(
                f"the update of {path!r} has shape {jnp.shape(update)} where its parameter has "
                f"{like.shape}: the transformation holds an array for all layers, but gets one "
                "layer at a time. Keep the array in its state, or pick its entry by the extra "
                "argument `layer` of update."
            )


def check_layers_apart(whole: Layer, inside: list[bool]) -> None:
    """Raises if the layer axis of a leaf is an axis of its matrices.

    Args:
      whole: Parameters and state of all layers.
      inside: Per leaf of the parameters, whether it is in the blocks.
    """
    for plan in _projected(whole, inside):
        if plan.view is not None and 0 not in plan.view.batch:
            raise ValueError(
                f"leaf {plan.path!r} of shape {plan.shape} is projected across its layers: a stack "
                "of vectors is taken for a matrix (axes, targets)."
            )


def _check_layer_is_used(here: Layer, inside: list[bool], jaxpr: core.Jaxpr) -> None:
    """Raises if a wrapper keeps the extra argument `layer` from the lenses inside it."""
    layer = jaxpr.invars[0]
    used = any(layer is atom for eqn in jaxpr.eqns for atom in eqn.invars)
    if not used and any(_projected(here, inside)):
        raise ValueError(
            "the lens does not learn the number of the layer, because a transformation around it "
            "drops extra arguments. Make that one an optax.GradientTransformationExtraArgs that "
            "passes them on; for optax.MultiSteps: "
            "optax.GradientTransformationExtraArgs(steps.init, steps.update)."
        )


def _projected(layer: Layer, inside: list[bool]) -> Iterable[LeafPlan]:
    """The plans of the leaves in the blocks that some lens projects."""
    likes = likes_of(Leaves.of(layer.params))
    for state in low_rank_states(layer.opt_state):
        lens, owners = lens_on(state, likes)
        for plan, like in zip(lens.plans, owners, strict=True):
            if inside[like.owner] and plan.is_projected:
                yield plan
