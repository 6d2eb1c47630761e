"""Weights whose gradients are projected as they arise, and their products."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax import collectives
from galore_jax.backward.contraction import (
    Contraction,
    check_sizes,
    einsum_contraction,
    matmul_contraction,
    projected_contraction,
)
from galore_jax.backward.slots import CotangentSlots, cotangents_of
from galore_jax.meshes import with_auto_axes
from galore_jax.projectors import working_dtype
from galore_jax.quant.weight import WrappedWeight, decoded
from galore_jax.transforms import subspace
from galore_jax.transforms.config import LowRankConfig
from galore_jax.transforms.subspace import LeafSubspace
from galore_jax.views import LeafPlan


@dataclasses.dataclass(frozen=True)
class _Static:
    """Facts about one use of a weight that are known before it runs."""

    product: Any  # Contraction; None where the array itself is asked for
    config: LowRankConfig
    plan: LeafPlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ProjectedWeight(WrappedWeight):
    """A weight whose gradient is projected inside the backward pass, and never formed.

    Multiply with `galore_jax.matmul`, ``x @ w`` or `galore_jax.backward.einsum`, in one product:
    the gradients of two could not share a basis that is found inside one of them. For anything else
    ask for the array with `astype`: the gradient of that is formed before it is projected.

    Leading batch axes may be indexed away by `jax.lax.scan`, like those of any stacked parameters.

    Args:
      weight: The array or the `quant.QuantizedArray`.
      slots: The arrays that are differentiated by.
      space: Its bases, without the plan.
      plan: Plan of the whole leaf.
      config: Of the lens.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> params = {"w": jnp.ones((16, 8))}
      >>> tx, seen = gj.galore_sgd(1e-2, rank=2), []
      >>> loss = lambda p, x: seen.append(p["w"]) or jnp.sum(x @ p["w"])
      >>> _ = gj.projected_value_and_grad(loss, tx)(params, tx.init(params), jnp.ones((4, 16)))
      >>> type(seen[0]).__name__, seen[0].shape
      ('ProjectedWeight', (16, 8))
    """

    weight: Any
    slots: CotangentSlots
    space: LeafSubspace
    plan: LeafPlan = dataclasses.field(metadata={"static": True})
    config: LowRankConfig = dataclasses.field(metadata={"static": True})

    @property
    def path(self) -> str:
        return self.plan.path

    def _static(self, product: Contraction | None) -> _Static:
        """With the plan of what is left where leading axes have been indexed away."""
        view = self.plan.view
        assert view is not None
        gone = len(view.shape) - self.ndim
        try:
            here = view.inside(gone)
        except ValueError as error:
            raise ValueError(f"leaf {self.plan.path!r}: {error}.") from error
        if here.shape != self.shape:
            raise ValueError(
                f"leaf {self.plan.path!r} of shape {view.shape} was sliced to {self.shape}: only "
                "its leading axes can be indexed, one entry at a time."
            )
        plan = dataclasses.replace(self.plan, shape=self.shape, view=here)
        return _Static(product, self.config, plan)

    def decoded(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The array, whose gradient is formed before it is projected."""
        return _array(self._static(None), self.weight, self.slots, self.space).astype(dtype)

    def matmul(self, x: jax.Array) -> jax.Array:
        return product(matmul_contraction(jnp.ndim(x), self.ndim), x, self)

    def __getitem__(self, index: Any) -> ProjectedWeight:
        """One entry along leading batch axes; an ellipsis for all of it."""
        try:
            return jax.tree.map(operator.itemgetter(index), self)
        except IndexError as error:
            raise IndexError(
                f"leaf {self.plan.path!r} of shape {self.shape}: only leading batch axes of a "
                "ProjectedWeight can be indexed."
            ) from error


def einsum(subscripts: str, x: jax.Array, w: Any) -> jax.Array:
    """`jax.numpy.einsum` of activations and a weight of any form, for kernels with grouped axes.

    Args:
      subscripts: ``"x,w->y"``; an ellipsis may stand for leading axes of x and of the result.
      x: The activations.
      w: See `matmul`.

    Returns:
      The result, in the dtype of `x`.

    Raises:
      ValueError: The axes of a projected leaf are not those of the product, or `subscripts` do not
        fit.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> x, kernel = jnp.ones((2, 5, 16)), jnp.ones((16, 4, 8))  # [batch, tokens, embed]
      >>> gj.backward.einsum("...d,dhk->...hk", x, kernel).shape
      (2, 5, 4, 8)
    """
    if isinstance(w, ProjectedWeight):
        return product(einsum_contraction(subscripts, jnp.ndim(x), w.ndim), x, w)
    return jnp.einsum(subscripts, x, decoded(w, x.dtype))


def product(contraction: Contraction, x: jax.Array, w: ProjectedWeight) -> jax.Array:
    """Activations times a projected weight.

    Raises:
      ValueError: Axes of the leaf that are not those of the product, here rather than in the
        backward pass.
    """
    static = w._static(contraction)
    projected_contraction(contraction, static.plan)
    check_sizes(contraction, x.shape, static.plan)
    return _product(static, x, w.weight, w.slots, w.space)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    static: _Static, x: jax.Array, weight: Any, slots: CotangentSlots, leaf: LeafSubspace
) -> jax.Array:
    del slots, leaf
    return static.product(x, decoded(weight, x.dtype))


def _product_bwd(static: _Static, residuals: Any, dy: jax.Array):
    x, _, slots, _ = residuals
    backward = functools.partial(_cotangents, static)
    dx, cotangents = with_auto_axes(backward, residuals, dy, like=(x, slots))
    return dx, None, cotangents, None


def _cotangents(static: _Static, residuals: Any, dy: jax.Array) -> tuple[jax.Array, CotangentSlots]:
    """Of the activations and of the slots."""
    x, weight, slots, leaf = residuals
    leaf = leaf._replace(plan=static.plan)
    how = projected_contraction(static.product, static.plan)
    dx = static.product.cotangent_of_x(x, decoded(weight, x.dtype), dy)
    matrices = how.matrices(x, dy, working_dtype(static.plan.dtype))
    cotangents = cotangents_of(
        static.config, leaf, slots, matrices, lambda basis: how.project(x, dy, basis), like=(x, dy)
    )
    return collectives.psum_unvarying(dx, x), cotangents


_product.defvjp(lambda *args: (_product(*args), args[1:]), _product_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _array(static: _Static, weight: Any, slots: CotangentSlots, leaf: LeafSubspace) -> jax.Array:
    del leaf
    return collectives.varying(
        decoded(weight, static.plan.dtype), collectives.varying_axes(slots.value, ())
    )


def _array_bwd(static: _Static, residuals: Any, gradient: jax.Array):
    slots, _ = residuals
    backward = functools.partial(_cotangents_of_array, static)
    return None, with_auto_axes(backward, residuals, gradient, like=slots), None


def _cotangents_of_array(static: _Static, residuals: Any, gradient: jax.Array) -> CotangentSlots:
    """Of the slots."""
    slots, leaf = residuals
    plan = static.plan
    assert plan.view is not None
    return cotangents_of(
        static.config,
        leaf._replace(plan=plan),
        slots,
        subspace.dense_matrices(plan, [gradient]),
        functools.partial(plan.view.project, gradient),
        like=gradient,
    )


_array.defvjp(lambda *args: (_array(*args), args[2:]), _array_bwd)
