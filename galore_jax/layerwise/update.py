"""Updates that are made early or late, and of what is finite."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.layerwise.coupling import Numbers, Reads, dependence
from galore_jax.layerwise.passes import Forward, Model, barrier
from galore_jax.layerwise.slices import Layer, parts
from galore_jax.leaves import Leaves
from galore_jax.transforms import AccumulateState, apply_updates
from galore_jax.views import ProjectedGradient

# Numbers of leaves -> whether their gradients are finite; of none: whether the step is.
Finite = Callable[[Numbers], jax.Array]
# (gradients, finite) -> the gradients that the update gets, and what it is to take for finite.
Nonfinite = Callable[[Any, Finite], tuple[Any, Finite]]

_WINDOWS = (AccumulateState, optax.MultiStepsState)


def nonfinite_of(opt_state: Any) -> Nonfinite:
    """The treatment of gradients that are not finite.

    A state that is made from one gradient stays what it was. A sum over micro-batches must not, or
    the first gradient of a window would meet the sum of the window before it: there, what is not
    finite counts as zero.
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, _WINDOWS))
    windows = any(isinstance(node, _WINDOWS) for node in nodes)
    return zero_nonfinite if windows else lambda gradients, finite: (gradients, finite)


def zero_nonfinite(gradients: Any, finite: Finite) -> tuple[Any, Finite]:
    """Zeros in the places of leaves that are not finite, which then count as finite."""

    def zeroed(number: int, leaf: Any) -> Any:
        fine = finite(frozenset([number]))
        return jax.tree.map(lambda x: jnp.where(fine, x, jnp.zeros((), x.dtype)), leaf)

    leaves = Leaves.of(gradients)
    values = [zeroed(*pair) for pair in enumerate(leaves.values)]
    return leaves.boxed(values), lambda _: finite(frozenset())


def updated(
    update: Callable[..., tuple[Any, Any]],
    reads: Reads,
    key: jax.Array | None,
    here: Layer,
    gradients: Any,
    *,
    finite: Finite,
    layer: jax.Array,
    norm: jax.Array,
) -> Layer:
    """Parameters and state after an update, as far as it is finite.

    Where it is not, the update is zero, and state that is made from the gradient stays what it was,
    a basis with its moments; counts go on, and a basis that was due or becomes so is due.

    Args:
      update: ``(layer, norm, gradients, opt_state, params) -> (updates, opt_state)``.
      reads: Which gradients enter which of its results.
      key: For stochastic rounding, or None.
      here: Parameters and state, of the stacked arrays one layer.
      gradients: Like the parameters.
      finite: See `Finite`.
      layer: int32, the number of that layer.
      norm: fp32, the global norm of all gradients of the step, once it is known.
    """
    updates, opt_state = update(layer, norm, gradients, here.opt_state, here.params)
    new = apply_updates(here.params, updates, key=key, layer=layer)
    # Chosen among parameters: zeros in the place of an update would take the memory of one.
    leaves = Leaves.of(here.params)
    params = [
        jax.tree.map(functools.partial(jnp.where, finite(numbers)), after, before)
        for numbers, after, before in zip(
            reads.updates, Leaves.of(new).values, leaves.values, strict=True
        )
    ]
    old, treedef = jax.tree.flatten(here.opt_state)

    def kept(numbers: Numbers, is_date: bool, after: jax.Array, before: jax.Array) -> jax.Array:
        if is_date and numbers:
            before = before | (after & finite(frozenset()))
        return jnp.where(finite(numbers), after, before)

    state = list(map(kept, reads.state, reads.dates, parts(opt_state), old))
    return Layer(leaves.boxed(params), jax.tree.unflatten(treedef, state))


class EarlyUpdate(NamedTuple):
    """Parameters whose gradients are known when the head has been taken backwards.

    These gradients, as large as the vocabulary is, need not wait for those of the embedding.

    Args:
      numbers: Of the leaves whose gradients the embedding has no part in.
      arrays: Per array of a `Layer`, whether its update reads such gradients, and no others.
    """

    numbers: Numbers
    arrays: list[bool]

    def before(self, early: Layer, cotangent: Any) -> tuple[Layer, Any]:
        """Both unchanged, but the cotangent is there no sooner than the update.

        The compiler would be free to keep the gradients for an update after the pass.
        """
        treedef: Any
        leaves, treedef = jax.tree.flatten(early)
        pairs = list(zip(leaves, self.arrays, strict=True))
        known, cotangent = barrier(([x for x, is_early in pairs if is_early], cotangent))
        given = iter(known)
        return treedef.unflatten(next(given) if e else x for x, e in pairs), cotangent

    def merge(self, early: Layer, late: Layer) -> Layer:
        """The arrays of two updates, each from where all its gradients were there."""
        ours, treedef = jax.tree.flatten(early)
        pairs = zip(self.arrays, ours, parts(late), strict=True)
        return jax.tree.unflatten(treedef, [a if is_early else b for is_early, a, b in pairs])


def early_update(
    model: Model, reads: Reads, inside: list[bool], here: Layer, batch: Any, passed: Forward
) -> EarlyUpdate:
    """Finds the parameters that can be updated before the blocks are passed backwards.

    Args:
      model: The model.
      reads: Which gradients enter which update.
      inside: Per leaf of the parameters, whether it is in the blocks.
      here: Any layer.
      batch: The batch.
      passed: The forward pass.

    Raises:
      ValueError: A projected leaf has a part in both, each of which would find a basis for it.
    """
    by_embed = _read_by(lambda params: model.apply_embed(params, batch), here.params)
    gradients, leaves = Leaves.of(passed.outer).values, Leaves.of(here.params)
    if twice := [n for n in by_embed if isinstance(gradients[n], ProjectedGradient)]:
        head = functools.partial(model.apply_head, batch=batch)
        for n in _read_by(head, here.params, passed.cotangent).intersection(twice):
            raise ValueError(
                f"leaf {leaves.paths[n]!r} is projected, and read by `embed` and by "
                "`head`, each of which would find a basis of its own. Keep it out of `targets`, or "
                "form all gradients with pullback=lambda fn, params, state, *x, layer=0: "
                "galore_jax.backward.pullback(fn, params, (), *x)."
            )
    numbers = frozenset(n for n, own in enumerate(inside) if not own) - by_embed

    def is_early(read: Numbers) -> bool:
        return bool(read) and read <= numbers

    pairs = zip(reads.updates, leaves.values, strict=True)
    params = [is_early(read) for read, x in pairs for _ in parts(x)]
    return EarlyUpdate(numbers, [*params, *map(is_early, reads.state)])


def _read_by(fn: Callable[..., Any], params: Any, *others: Any) -> Numbers:
    """The numbers of the leaves that the results of a function depend on."""
    leaves = enumerate(Leaves.of(params).values)
    numbers = [frozenset([n]) for n, leaf in leaves for _ in parts(leaf)]
    jaxpr = jax.make_jaxpr(fn)(params, *others).jaxpr
    none = [frozenset[int]()] * len(parts(others))
    return frozenset[int]().union(*dependence(jaxpr, [*numbers, *none]))
