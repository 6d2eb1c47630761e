"""Diagnostics of a run: movements of its subspaces, and the share of a gradient that they hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.leaves import Leaves, unboxed
from galore_jax.meshes import with_auto_axes
from galore_jax.projectors import HIGHEST
from galore_jax.transforms.lenses import kinds_in, projection_leaves
from galore_jax.transforms.state import LowRankState, low_rank_states
from galore_jax.transforms.subspace import as_stored, decode
from galore_jax.views import LeafPlan, ProjectedGradient


class SubspaceMetrics(NamedTuple):
    r"""The subspaces of one leaf, one entry per matrix of a stack.

    Args:
      refreshes: ``int32[*batch]``, how often each basis has been recomputed.
      gap: ``int32[*batch]``, steps between two refreshes as the policy has it now; zero if the
        policy has none.
      overlap: ``float32[*batch]``, the share :math:`\|P_{old}^\top P_{new}\|_F^2 / r` of the
        subspace before the last refresh that lies in the one after it: one if it held still, rank /
        projected on average if the two have nothing to do with each other. Zero until there have
        been two refreshes.
    """

    refreshes: jax.Array
    gap: jax.Array
    overlap: jax.Array


def metrics(opt_state: Any) -> dict[str, SubspaceMetrics]:
    """Movements of every subspace: how many, how far, and the steps until the next one.

    Reads what the state holds and computes nothing: the overlap is taken during a refresh, which
    has both bases at hand, and costs it one product of rank × projected × rank. Works under `jit`,
    on state in shards, and on the state of any chain, mask, partition or wrapper. The arrays are
    copies: they outlive a state whose buffers are donated.

    Args:
      opt_state: State of any optax transformation.

    Returns:
      For each projected leaf its `SubspaceMetrics`, by path; empty without a lens.

    Raises:
      ValueError: Two lenses project leaves of the same path, or a lens has lost its config.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> params = {"blocks": jnp.ones((3, 64, 128)), "bias": jnp.ones((128,))}
      >>> tx = gj.galore_adamw(1e-2, rank=8, update_proj_gap=50, axes=gj.MatrixAxes())
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> seen = gj.metrics(state)["blocks"]
      >>> seen.refreshes.tolist(), seen.gap.tolist(), seen.overlap.tolist()
      ([1, 1, 1], [50, 50, 50], [0.0, 0.0, 0.0])
    """
    found: dict[str, SubspaceMetrics] = {}
    for lens in low_rank_states(unboxed(opt_state)):
        for path, seen in _of_lens(lens):
            if path in found:
                raise ValueError(
                    f"leaf {path!r} is projected by two lenses of this state, perhaps because it "
                    "holds several optimizers: ask about the state of each of them."
                )
            found[path] = seen
    return found


def _of_lens(state: LowRankState) -> Iterator[tuple[str, SubspaceMetrics]]:
    """The projected leaves of one lens."""
    flags = state.refresh_state
    for name, paths in kinds_in(state).items():
        gap = jnp.asarray(state.config.refresh.current_gap(flags.memory[name]), jnp.int32)
        gap = jnp.broadcast_to(gap, flags.due[name].shape)
        numbers = flags.refreshes[name], gap, flags.overlap[name]
        for place, path in enumerate(paths):
            own = numbers if len(paths) == 1 else [number[place] for number in numbers]
            yield path, SubspaceMetrics(*map(jnp.copy, own))


def captured_energy(grads: Any, opt_state: Any) -> dict[str, jax.Array]:
    r"""Share of each gradient that lies in the subspace it is projected onto.

    For a gradient :math:`G` and an orthonormal basis :math:`P` of the subspace,

    .. math::
      \|G P P^\top\|_F^2 \,/\, \|G\|_F^2 \in [0, 1].

    What is missing to one is lost to the optimizer. Just after a refresh this tells whether the
    rank suffices; just before the next one, whether the gap is short enough. The bases are those
    that the state holds: before ``update`` the old ones, after it those that its gradients were
    projected onto.

    A basis stored in few bits is not quite orthonormal; the share is that in the space which its
    columns span. Of a gradient that is zero nothing is lost: its share is one. Of one that is not
    finite it is NaN.

    Args:
      grads: Gradients like the parameters, formed in full. Under mapped axes, their means.
      opt_state: State of any optax transformation.

    Returns:
      For each projected leaf ``float[*batch]``, one number per matrix of a stack, by path; empty
      without a lens.

    Raises:
      ValueError: A gradient is a `ProjectedGradient`, which does not know what it lost, or is
        missing, or has another shape than the state was made for.

    Example:
      >>> import jax, jax.numpy as jnp, galore_jax as gj
      >>> params = {"w": jnp.zeros((64, 32))}
      >>> grads = {"w": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> tx = gj.galore_adamw(1e-2, rank=16)
      >>> _, state = tx.update(grads, tx.init(params), params)
      >>> bool(gj.captured_energy(grads, state)["w"] > 0.7)
      True
    """
    opt_state = unboxed(opt_state)
    like = {path: seen.refreshes for path, seen in metrics(opt_state).items()}
    _check_gradients(Leaves.of(grads), list(like))
    return with_auto_axes(_shares, grads, opt_state, like=like)


def _check_gradients(grads: Leaves, projected: list[str]) -> None:
    """Raises if a gradient is missing or arrives projected."""
    for path in projected:
        if path not in grads.paths:
            raise ValueError(
                f"leaf {path!r} of the optimizer state has no gradient; those given are "
                f"{sorted(grads.paths)}. Pass the whole gradient tree that `update` gets."
            )
    for path, grad in zip(grads.paths, grads.values, strict=True):
        if isinstance(grad, ProjectedGradient):
            raise ValueError(
                f"leaf {path!r} has a ProjectedGradient: what its projection lost is not in it. "
                "Take the gradient in full, with jax.grad or quant.value_and_grad, on the steps "
                "on which you want to know."
            )


def _shares(grads: Any, opt_state: Any) -> dict[str, jax.Array]:
    """The shares of all leaves that any lens projects."""
    leaves, shares = Leaves.of(grads), {}
    for config, subspaces, owners in projection_leaves(opt_state, grads):
        for leaf, owner in zip(subspaces, owners, strict=True):
            if leaf.plan.is_projected:
                stored = as_stored(config, leaf.plan, leaf.stored)
                basis = decode(config, leaf.plan, stored)
                shares[leaf.plan.path] = _share(leaf.plan, leaves.values[owner], basis)
    return shares


def _share(plan: LeafPlan, gradient: jax.Array, basis: jax.Array) -> jax.Array:
    """The share of one leaf, ``[*batch]``."""
    view = plan.view
    assert view is not None
    sides = view.kept + view.projected
    largest = jnp.max(jnp.abs(gradient), axis=sides).astype(basis.dtype)
    # Of gradients in units of their largest entry no square overflows, and not all of them vanish.
    unit = jnp.where(largest == 0, jnp.ones_like(largest), largest)
    entries = gradient.astype(basis.dtype) / jnp.expand_dims(unit, sides)
    projected = view.project(gradient, basis, HIGHEST) / unit[..., None, None]
    weights = _inverse_gram(basis.astype(gradient.dtype).astype(basis.dtype))
    captured = jnp.sum(projected * jnp.matmul(projected, weights, precision=HIGHEST), (-2, -1))
    share = captured / jnp.sum(entries**2, axis=sides)
    return jnp.where(largest == 0, jnp.ones_like(share), jnp.minimum(share, 1))


def _inverse_gram(basis: jax.Array) -> jax.Array:
    """``(PᵀP)⁻¹ [*batch, rank, rank]``: the identity, up to what storage did to P.

    Newton's iteration, from below: a column of zeros, which few bits may make of a small one, gets
    a weight that is finite. By products alone: batches of factorizations that run side by side can
    block each other on the CPU, where each waits for threads that the others hold (jaxlib 0.10).
    """
    gram = jnp.einsum("...pr,...ps->...rs", basis, basis, precision=HIGHEST)
    largest = jnp.max(jnp.sum(jnp.abs(gram), axis=-1), axis=-1)  # of the eigenvalues, or above
    start = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    start = start / largest[..., None, None]

    def improve(_: int, inverse: jax.Array) -> jax.Array:
        step = jnp.matmul(gram, inverse, precision=HIGHEST)
        return 2 * inverse - jnp.matmul(inverse, step, precision=HIGHEST)

    # The error is squared in each: enough for eigenvalues that are a hundred times apart.
    return jax.lax.fori_loop(0, 11, improve, start)
