"""Arrays that are differentiated by in the place of a weight, and their cotangents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax import collectives
from galore_jax.transforms import subspace
from galore_jax.transforms.config import LowRankConfig
from galore_jax.transforms.subspace import LeafSubspace, Matrices
from galore_jax.views import ProjectedGradient


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CotangentSlots:
    """Arrays that are differentiated by in the place of a weight.

    Their values are never read, apart from the basis; their cotangents are what the optimizer wants
    to know. Cotangents of a weight that takes part in several products add up.

    Args:
      value: ``[*batch, kept, rank]`` zeros; receives the projected gradient R.
      basis: ``[*batch, projected, rank]``, the basis in use; receives the one that R was taken in.
      moved: ``float32[*batch]`` zeros; receives ones where the basis is new.
      uses: ``float32[*batch]`` zeros; receives the number of products.
    """

    value: jax.Array
    basis: jax.Array
    moved: jax.Array
    uses: jax.Array


def zero_slots(leaf: LeafSubspace, config: LowRankConfig, basis: jax.Array) -> CotangentSlots:
    """Slots of one leaf."""
    assert leaf.plan.view is not None
    return CotangentSlots(
        value=jnp.zeros(leaf.plan.view.low_rank_shape(leaf.plan.rank), config.state_dtype),
        basis=basis,
        moved=jnp.zeros(leaf.plan.batch_shape, jnp.float32),
        uses=jnp.zeros(leaf.plan.batch_shape, jnp.float32),
    )


def gradient_of(cotangents: CotangentSlots) -> ProjectedGradient:
    """The gradient that the optimizer gets.

    Products that each found a basis of their own have no projected gradient in common: NaN, in a
    basis that is NaN and therefore never taken over. A weight that takes part in no product gets a
    gradient of zero.
    """
    moved = cotangents.moved > 0
    several = (moved & (cotangents.uses > 1))[..., None, None]
    uses = jnp.maximum(cotangents.uses, 1)[..., None, None].astype(cotangents.basis.dtype)
    return ProjectedGradient(
        jnp.where(several, jnp.nan, cotangents.value),
        jnp.where(several, jnp.nan, cotangents.basis / uses),
        moved,
        used=cotangents.uses > 0,
    )


def cotangents_of(
    config: LowRankConfig,
    leaf: LeafSubspace,
    slots: CotangentSlots,
    matrices: Matrices,
    project: Callable[[jax.Array], jax.Array],
    *,
    like: Any,
) -> CotangentSlots:
    """Refreshes the bases that are due, and projects.

    Args:
      config: Of the lens.
      leaf: The leaf, as far as it has not been indexed away.
      slots: The arrays that are differentiated by.
      matrices: The gradient, by its products.
      project: ``basis -> R``.
      like: Arrays that the gradient is made of, to see over which mapped axes it varies.
    """
    names = {*collectives.names(config.axis_name), *collectives.varying_axes(like, slots.basis)}
    everywhere = dataclasses.replace(config, axis_name=tuple(sorted(names)) or None)
    refreshed = subspace.refresh(everywhere, leaf, matrices)
    basis = jax.lax.cond(
        jnp.any(refreshed.moved),
        lambda: subspace.decode(config, leaf.plan, refreshed.stored),
        lambda: slots.basis,
    )
    return CotangentSlots(
        value=collectives.psum_unvarying(project(basis).astype(slots.value.dtype), slots.value),
        basis=basis,
        moved=refreshed.moved.astype(slots.moved.dtype),
        uses=jnp.ones_like(slots.uses),
    )
