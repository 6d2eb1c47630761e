"""How much of a gradient a subspace holds."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.diagnostics.metrics import metrics
from galore_jax.meshes import compiler_chooses
from galore_jax.projectors import HIGHEST
from galore_jax.transforms.lenses import find_lenses, lens_leaves
from galore_jax.transforms.subspace import check_stored, decode
from galore_jax.views import LeafPlan, ProjectedGradient
from galore_jax.views.leaves import flatten_leaves, leaf_paths

# The error is squared in each: enough for eigenvalues that are a hundred times apart.
_NEWTON_STEPS = 11


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
    wanted = metrics(opt_state)
    _check_gradients(grads, opt_state, list(wanted))
    like = {path: seen.refreshes for path, seen in wanted.items()}
    return compiler_chooses(_shares, grads, opt_state, like=like)


def _check_gradients(grads: Any, opt_state: Any, projected: list[str]) -> None:
    """Raises if a gradient is missing or arrives projected."""
    given = dict(zip(leaf_paths(grads), flatten_leaves(grads)[0], strict=True))
    for lens in find_lenses(opt_state):
        for path in leaf_paths(lens.refresh_state.refreshes):
            if path not in given:
                raise ValueError(
                    f"leaf {path!r} of the optimizer state has no gradient; those given are "
                    f"{sorted(given)}. Pass the whole gradient tree that `update` gets."
                )
    for path in projected:
        if isinstance(given[path], ProjectedGradient):
            raise ValueError(
                f"leaf {path!r} has a ProjectedGradient: what its projection lost is not in it. "
                "Take the gradient in full, with jax.grad or quant.value_and_grad, on the steps "
                "on which you want to know."
            )


def _shares(grads: Any, opt_state: Any) -> dict[str, jax.Array]:
    """The shares of all leaves that any lens projects."""
    given = dict(zip(leaf_paths(grads), flatten_leaves(grads)[0], strict=True))
    shares = {}
    for config, leaves in lens_leaves(opt_state, grads):
        for leaf in leaves:
            if leaf.plan.is_projected:
                check_stored(config, leaf.plan, leaf.stored)
                basis = decode(config, leaf.plan, leaf.stored)
                shares[leaf.plan.path] = _share(leaf.plan, given[leaf.plan.path], basis)
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
    """(PᵀP)⁻¹ ``[*batch, rank, rank]``, the identity up to what storage did to P.

    Newton's iteration, from below: a column of zeros, which few bits may make of a small one, gets
    a weight that is finite. By products alone: batches of factorizations that run side by side can
    lock each other up on the CPU, where each waits for threads that the others hold (jaxlib 0.10).
    """
    gram = jnp.einsum("...pr,...ps->...rs", basis, basis, precision=HIGHEST)
    largest = jnp.max(jnp.sum(jnp.abs(gram), axis=-1), axis=-1)  # of the eigenvalues, or above
    start = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    start = start / largest[..., None, None]
    product = functools.partial(jnp.matmul, precision=HIGHEST)

    def improve(_: int, inverse: jax.Array) -> jax.Array:
        return 2 * inverse - product(inverse, product(gram, inverse))

    return jax.lax.fori_loop(0, _NEWTON_STEPS, improve, start)
