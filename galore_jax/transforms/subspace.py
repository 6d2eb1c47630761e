"""One leaf: its stored bases, their refresh from its gradient, and what is projected onto them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.projectors import (
    HIGHEST,
    MatrixOperator,
    dense_operator,
    mean_operator,
    orthonormalize,
    working_dtype,
)
from galore_jax.transforms.config import LowRankConfig
from galore_jax.transport import BasisChange
from galore_jax.views import LeafPlan


class LeafSubspace(NamedTuple):
    """The subspaces of one leaf at the start of a step.

    Args:
      plan: The leaf's plan.
      stored: Its stored bases.
      due: ``bool[*batch]``.
      refreshes: ``int32[*batch]``, how often each basis has been recomputed.
      key: ``uint32[*batch, 2]``, randomness for this step.
    """

    plan: LeafPlan
    stored: Any
    due: jax.Array
    refreshes: jax.Array
    key: jax.Array


class Refreshed(NamedTuple):
    """The bases of one leaf after its refresh.

    Args:
      stored: Their stored form.
      moved: ``bool[*batch]``, which of them are new.
      overlap: ``float32[*batch]``, share of the old subspace that lies in the new one; zero where
        nothing moved.
      similarity: ``float32[*batch]``, the same in the measure of the refresh policy.
    """

    stored: Any
    moved: jax.Array
    overlap: jax.Array
    similarity: jax.Array


# Branches of one conditional.
_WAYS = 8
# A gradient matrix by its number along the flattened batch axes of its leaf.
Matrices = Callable[[jax.Array], MatrixOperator]


def decode(config: LowRankConfig, plan: LeafPlan, stored: Any) -> jax.Array:
    """The basis that projects and lifts, ``[*batch, projected, rank]``."""
    assert plan.view is not None
    shape = plan.view.basis_shape(plan.rank)
    return config.codec.decode(stored, working_dtype(plan.dtype), shape)


def initial_basis(config: LowRankConfig, plan: LeafPlan) -> Any:
    """The first coordinate vectors: orthonormal, so that nothing is ever projected to zero."""
    assert plan.view is not None
    *batch, projected, rank = shape = plan.view.basis_shape(plan.rank)
    eye = jnp.eye(projected, rank, dtype=working_dtype(plan.dtype))
    return config.codec.encode(jnp.broadcast_to(eye, shape), jnp.zeros((*batch, 2), jnp.uint32))


def as_stored(config: LowRankConfig, plan: LeafPlan, stored: Any) -> Any:
    """Stored bases in the dtypes that their codec gives them.

    A state may have been averaged, cast or sent through somebody's arithmetic in between.

    Raises:
      ValueError: They are not of the planned shape, or codes have become fractions.
    """
    expected = jax.eval_shape(functools.partial(initial_basis, config, plan))
    form: Any = jax.tree.structure(expected)
    same = jax.tree.structure(stored) == form
    pairs = list(zip(*map(jax.tree.leaves, (stored, expected)), strict=False)) if same else []
    if not same or any(jnp.shape(part) != like.shape for part, like in pairs):
        assert plan.view is not None
        seen = ", ".join(str(jnp.shape(part)) for part in jax.tree.leaves(stored))
        raise ValueError(
            f"leaf {plan.path!r}: the state holds a basis of shape {seen}, but this transformation "
            f"needs {plan.view.basis_shape(plan.rank)} in {config.codec}. It was made with another "
            "rank, side, axes or codec, or for other parameters: init anew, or restore with the "
            "old values."
        )
    for part, like in pairs:
        if part.dtype != like.dtype and not jnp.issubdtype(like.dtype, jnp.floating):
            raise ValueError(
                f"leaf {plan.path!r}: the codes of its basis are {part.dtype} instead of "
                f"{like.dtype}: something did arithmetic on the optimizer state (an average, a "
                "cast). Leave states with few bits alone, or use codecs.identity()."
            )
    return jax.tree.map(lambda part, like: part.astype(like.dtype), stored, expected)


def project(
    config: LowRankConfig, plan: LeafPlan, gradient: jax.Array, basis: jax.Array
) -> jax.Array:
    """R = G·P, ``[*batch, kept, rank]`` in the state dtype."""
    assert plan.view is not None
    return plan.view.project(gradient, basis).astype(config.state_dtype)


def change_of(
    config: LowRankConfig, plan: LeafPlan, old: Any, new: Any, moved: jax.Array, initial: jax.Array
) -> BasisChange:
    """The change from stored bases to others, decoded."""
    return BasisChange(decode(config, plan, old), decode(config, plan, new), moved, initial)


def unmoved(stored: Any, batch: jax.Array) -> Refreshed:
    """A leaf whose bases stay; `batch` is any array of the shape of its batch axes."""
    zero = jnp.zeros_like(batch, dtype=jnp.float32)
    return Refreshed(stored, jnp.zeros_like(batch, dtype=bool), zero, zero)


def overlap(old: jax.Array, new: jax.Array) -> jax.Array:
    r"""Share of a subspace that lies in another one, :math:`\|P_{old}^\top P_{new}\|_F^2 / r`.

    The mean squared cosine of the angles between them: one for equal subspaces, whatever their
    bases; rank / projected on average for two random ones.

    Args:
      old: ``[*batch, projected, rank]``, orthonormal columns.
      new: The same.

    Returns:
      ``[*batch]``, between zero and one.
    """
    product = jnp.einsum("...pr,...ps->...rs", old, new, precision=HIGHEST)
    return jnp.sum(product**2, axis=(-2, -1)) / old.shape[-1]


def replaced(
    config: LowRankConfig,
    plan: LeafPlan,
    stored: Any,
    basis: jax.Array,
    usable: jax.Array,
    key: jax.Array,
) -> Refreshed:
    """New bases in the places of old ones, where they are usable.

    Here both are at hand. Compared later, the old ones would have to be kept for every step.

    Args:
      config: The lens.
      plan: Plan of the leaf, or of one matrix of it.
      stored: Stored form of the old bases.
      basis: ``[*batch, projected, rank]``, the new ones.
      usable: ``bool[*batch]``.
      key: ``uint32[*batch, 2]``, what the projector drew its random numbers with.
    """
    encoded = config.codec.encode(basis.astype(working_dtype(plan.dtype)), key)
    pair = [config.codec.decode(x, basis.dtype, basis.shape) for x in (stored, encoded)]
    axes = basis.ndim - 2
    if not config.projector.orthonormal:
        rows, rank = basis.shape[-2:]
        fill = jnp.eye(rows, rank, dtype=basis.dtype)
        pair = [over_batch(lambda b: orthonormalize(b, fill), axes)(b) for b in pair]
    # Columns in few bits are not quite orthonormal: a share may come out above one.
    similarity = config.refresh.similarity
    shares = [
        jnp.minimum(over_batch(measure, axes)(*pair), 1).astype(jnp.float32)
        for measure in ([overlap] if similarity is None else [overlap, similarity])
    ]
    shares = [jnp.where(usable, share, jnp.zeros_like(share)) for share in shares]
    return Refreshed(where_matrices(usable, encoded, stored), usable, shares[0], shares[-1])


def refresh(config: LowRankConfig, leaf: LeafSubspace, gradient: Matrices) -> Refreshed:
    """Recomputes the bases of one leaf that are due, under one conditional for all of them."""

    def due() -> Refreshed:
        ((stored,), *flags) = refresh_due(config, leaf._replace(stored=[leaf.stored]), gradient)
        return Refreshed(stored, *flags)

    return jax.lax.cond(jnp.any(leaf.due), due, lambda: unmoved(leaf.stored, leaf.due))


class _Progress(NamedTuple):
    """Loop state over the matrices of a group."""

    left: jax.Array
    refreshed: Refreshed


def refresh_due(config: LowRankConfig, group: LeafSubspace, gradient: Matrices) -> Refreshed:
    """Recomputes the bases that are due, from their gradients.

    A loop over the due matrices of all leaves: one factorization is compiled, and the memory of one
    is live at a time. A gradient that is not finite, or is zero, costs no factorization and moves
    nothing.

    Args:
      config: The lens.
      group: Leaves whose plans differ in their paths only: the plan of one, a list of stored bases,
        and their flags and keys in one array each, ``[leaves, *batch, ...]`` or ``[*batch, ...]``.
      gradient: Their gradient matrices, by their numbers in that order.

    Returns:
      The bases, in the same form.
    """
    plan, view, shape = group.plan, group.plan.view, group.due.shape
    assert view is not None
    due, refreshes = group.due.reshape(-1), group.refreshes.reshape(-1)
    key = group.key.reshape(-1, group.key.shape[-1])
    stored = _concatenate(view.batch_shape, group.stored)

    def body(progress: _Progress) -> _Progress:
        # Unsigned: an index that cannot be negative needs no wrapping around.
        number = jnp.argmax(progress.left).astype(jnp.uint32)
        matrix = mean_operator(gradient(number), config.axis_name)
        old = jax.tree.map(lambda parts: _at(parts, number), progress.refreshed.stored)

        def find() -> Refreshed:
            previous = config.codec.decode(old, matrix.dtype, (view.projected_size, plan.rank))
            basis = config.projector.basis(
                matrix,
                plan.rank,
                previous=previous,
                refreshes=_at(refreshes, number),
                key=_at(key, number),
            )
            basis = config.transport.turn(basis, previous)
            finite = jnp.all(jnp.isfinite(basis))
            return replaced(config, plan, old, basis, finite, _at(key, number))

        refreshed = jax.lax.cond(matrix.is_usable, find, lambda: unmoved(old, number))
        return jax.tree.map(
            lambda parts, part: jax.lax.dynamic_update_index_in_dim(parts, part, number, 0),
            progress,
            _Progress(jnp.zeros((), bool), refreshed),
        )

    start = _Progress(due, unmoved(stored, due))
    done = jax.lax.while_loop(lambda progress: jnp.any(progress.left), body, start).refreshed
    return Refreshed(
        _split(view.batch_shape, len(group.stored), done.stored),
        *(flags.reshape(shape) for flags in done[1:]),
    )


def dense_matrices(plan: LeafPlan, gradients: Sequence[jax.Array]) -> Matrices:
    """The matrices of gradients that exist, in the shapes of equal leaves.

    One matrix at a time is copied out of its leaf, so that the program has one copy of what is done
    with it.
    """
    view = plan.view
    assert view is not None
    if len(gradients) == 1:
        return lambda number: dense_operator(view.entry(gradients[0], number), view.unbatched)

    def matrix(number: jax.Array) -> MatrixOperator:
        leaf, index = jnp.divmod(number, view.num_matrices)
        entries = [functools.partial(view.entry, gradient, index) for gradient in gradients]
        return dense_operator(_switch(leaf, entries), view.unbatched)

    return matrix


def _switch(choice: jax.Array, branches: Sequence[Callable[[], jax.Array]]) -> jax.Array:
    """`jax.lax.switch` as a tree of small ones.

    What any branch reads is an operand of all of them: branches times operands would grow with the
    square of their number, and the time to compile with it.
    """
    if len(branches) <= _WAYS:
        return jax.lax.switch(choice, branches)
    size = -(-len(branches) // _WAYS)
    groups = [branches[i : i + size] for i in range(0, len(branches), size)]
    rest = choice % size
    return jax.lax.switch(
        choice // size, [functools.partial(_switch, rest, group) for group in groups]
    )


def over_batch(fn: Callable[..., jax.Array], axes: int) -> Callable[..., jax.Array]:
    """`fn` of matrices, mapped over leading batch axes."""
    for _ in range(axes):
        fn = jax.vmap(fn)
    return fn


def where_matrices(condition: jax.Array, new: Any, old: Any) -> Any:
    """`new` where `condition` (batch axes), part by part of a stored form."""
    axes = condition.ndim
    return jax.tree.map(
        lambda a, b: jnp.where(condition.reshape(condition.shape + (1,) * (a.ndim - axes)), a, b),
        new,
        old,
    )


def _concatenate(batch: tuple[int, ...], leaves: list[Any]) -> Any:
    """Stored forms ``[*batch, ...]`` of several leaves -> ``[leaves · matrices, ...]``."""

    axes = len(batch)
    rows = [jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), leaf) for leaf in leaves]
    return rows[0] if len(rows) == 1 else jax.tree.map(lambda *xs: jnp.concatenate(xs), *rows)


def _split(batch: tuple[int, ...], count: int, flat: Any) -> list[Any]:
    """Inverse of `_concatenate`."""
    per_leaf = jax.tree.map(lambda part: part.reshape(count, *batch, *part.shape[1:]), flat)
    return [jax.tree.map(lambda part, i=i: part[i], per_leaf) for i in range(count)]


def _at(parts: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(parts, number, 0, keepdims=False)
