"""A product with a weight as a contraction of named axes, and what its gradient is known by."""

from __future__ import annotations

import dataclasses
import itertools
import math
import string

import jax
import jax.numpy as jnp

from galore_jax.projectors import HIGHEST, MatrixOperator
from galore_jax.transforms.subspace import Matrices
from galore_jax.views import LeafPlan, MatrixView

# The axis of length `rank`, and what other axes are called.
_RANK = "Z"
_NAMES = string.ascii_uppercase.replace(_RANK, "")


@dataclasses.dataclass(frozen=True)
class Contraction:
    """y = einsum(x, w), one letter for each axis.

    Args:
      x: Axes of the activations.
      w: Axes of the weight.
      y: Axes of the result.
    """

    x: str
    w: str
    y: str

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum(f"{self.x},{self.w}->{self.y}", x, w)

    def cotangent_of_x(self, x: jax.Array, w: jax.Array, dy: jax.Array) -> jax.Array:
        """dL/dx."""
        _, pull = jax.vjp(lambda x: self(x, w), x)
        return pull(dy)[0]

    def gradient(self, x: jax.Array, dy: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """dL/dw, formed."""
        product = jnp.einsum(f"{self.x},{self.y}->{self.w}", x, dy, preferred_element_type=dtype)
        return product.astype(dtype)


def matmul_contraction(x_ndim: int, w_ndim: int) -> Contraction:
    """Of `jax.numpy.matmul` with a weight ``[*batch, in, out]``."""
    batch, rows = string.ascii_lowercase[: w_ndim - 2], x_ndim - 2
    if not batch:
        lead = _NAMES[: x_ndim - 1]
        return Contraction(f"{lead}y", "yz", f"{lead}z")
    # Leading axes of x broadcast with those of w, aligned at their ends.
    shared = batch[max(len(batch) - max(rows, 0), 0) :] if rows > 0 else ""
    extra = _NAMES[: max(rows - len(shared), 0)]
    row = _NAMES[-1] if x_ndim > 1 else ""
    return Contraction(f"{extra}{shared}{row}y", f"{batch}yz", f"{extra}{batch}{row}z")


def einsum_contraction(subscripts: str, x_ndim: int, w_ndim: int) -> Contraction:
    """Of `jax.numpy.einsum`; an ellipsis may stand for axes of x and of the result.

    Raises:
      ValueError: Not of the form ``"x,w->y"``, or with other numbers of axes.
    """
    try:
        operands, y = subscripts.replace(" ", "").split("->")
        x, w = operands.split(",")
    except ValueError:
        raise ValueError(
            f'expected subscripts "x,w->y" of activations, weight and result, got {subscripts!r}.'
        ) from None
    free = (name for name in _NAMES if name not in subscripts)
    dots = "".join(itertools.islice(free, max(x_ndim - len(x.replace("...", "")), 0)))
    found = Contraction(x.replace("...", dots), w, y.replace("...", dots))
    if len(found.x) != x_ndim or len(found.w) != w_ndim or _RANK in subscripts:
        raise ValueError(
            f"{subscripts!r} does not fit activations with {x_ndim} axes and a weight with "
            f"{w_ndim} (the name {_RANK} is taken)."
        )
    return found


@dataclasses.dataclass(frozen=True)
class ProjectedContraction:
    """What the backward pass of a product computes in the place of the gradient G of its weight.

    Args:
      product: The product.
      view: Which axes of the weight are kept and projected: those contracted with the activations
        and those of the result, either way round.
    """

    product: Contraction
    view: MatrixView

    def project(
        self,
        x: jax.Array,
        dy: jax.Array,
        basis: jax.Array,
        precision: jax.lax.PrecisionLike = None,
    ) -> jax.Array:
        """R = G·P, ``[*batch, kept, rank]``: a skinny product on the side of P, then another.

        Args:
          x: The activations.
          dy: Cotangent of the result.
          basis: ``[*batch, projected, rank]``; the result accumulates in its dtype.
          precision: Of the products.
        """
        batch, kept, projected = map(self._names, ("batch", "kept", "projected"))
        near, far = (x, self.product.x), (dy, self.product.y)
        if not self._on_x("projected"):
            near, far = far, near
        factor = basis.reshape(*self._sizes("batch"), *self._sizes("projected"), -1)
        skinny = "".join(name for name in near[1] if name not in projected) + _RANK
        # Activations that all matrices of a batch share become different ones here.
        skinny = "".join(name for name in batch if name not in skinny) + skinny
        product = jnp.einsum(
            f"{near[1]},{batch}{projected}{_RANK}->{skinny}",
            near[0],
            factor.astype(x.dtype),
            precision=precision,
        )
        low_rank = jnp.einsum(
            f"{far[1]},{skinny}->{batch}{kept}{_RANK}",
            far[0],
            product,
            precision=precision,
            preferred_element_type=basis.dtype,
        )
        return low_rank.reshape(self.view.low_rank_shape(basis.shape[-1]))

    def matrices(self, x: jax.Array, dy: jax.Array, dtype: jax.typing.DTypeLike) -> Matrices:
        """The gradient matrices, known by their products with others in `dtype`."""

        def matrix(index: jax.Array) -> MatrixOperator:
            one, x_entry, dy_entry = self._entry(x, dy, index)
            a, b = x_entry.astype(dtype), dy_entry.astype(dtype)
            other = dataclasses.replace(one, view=one.view.transposed)
            # No entry of G exceeds the number of its terms times the largest of them; zero or not
            # finite are G and this bound together.
            terms = a.size // math.prod(one._sizes("kept" if one._on_x("kept") else "projected"))
            return MatrixOperator(
                shape=(one.view.kept_size, one.view.projected_size),
                dtype=dtype,
                matmul=lambda v: one.project(a, b, v, HIGHEST),
                rmatmul=lambda u: other.project(a, b, u, HIGHEST),
                magnitude=jnp.max(jnp.abs(a)) * jnp.max(jnp.abs(b)) * terms,
                projects_input=one.view.projects_input,
            )

        return matrix

    def _entry(
        self, x: jax.Array, dy: jax.Array, index: jax.Array
    ) -> tuple[ProjectedContraction, jax.Array, jax.Array]:
        """The product that one matrix of a batch takes part in."""
        x_axes, w_axes, y_axes = dataclasses.astuple(self.product)
        for name, position in zip(self._names("batch"), self.view.positions(index), strict=True):
            x, x_axes = _take(x, x_axes, name, position)
            dy, y_axes = _take(dy, y_axes, name, position)
            w_axes = w_axes.replace(name, "")
        return ProjectedContraction(Contraction(x_axes, w_axes, y_axes), self.view.unbatched), x, dy

    def _on_x(self, side: str) -> bool:
        return self._names(side)[0] in self.product.x

    def _names(self, side: str) -> str:
        return "".join(self.product.w[axis] for axis in getattr(self.view, side))

    def _sizes(self, side: str) -> tuple[int, ...]:
        return tuple(self.view.shape[axis] for axis in getattr(self.view, side))


def projected_contraction(product: Contraction, plan: LeafPlan) -> ProjectedContraction:
    """The backward pass of `product` for a leaf.

    Raises:
      ValueError: The matrix axes of the leaf are not the two sides of the product.
    """
    assert plan.view is not None
    found = ProjectedContraction(product, plan.view)
    batch, *sides = (set(found._names(side)) for side in ("batch", "kept", "projected"))
    contracted = {name for name in product.w if name in product.x and name not in product.y}
    produced = set(product.w) - contracted - batch
    if contracted not in sides or produced not in sides or contracted & batch:
        raise ValueError(
            f"leaf {plan.path!r} of shape {plan.shape} is a batch of matrices over the axes "
            f"{plan.view.kept} and {plan.view.projected}, but the product "
            f"{product.x},{product.w}->{product.y} contracts others. Name those in `axes`, or let "
            "its gradient be formed with w.astype(dtype)."
        )
    return found


def _take(
    array: jax.Array, axes: str, name: str, position: jax.Array | int
) -> tuple[jax.Array, str]:
    """One entry along the axis called `name`, if there is one."""
    if name not in axes:
        return array, axes
    entry = jax.lax.dynamic_index_in_dim(array, position, axes.index(name), keepdims=False)
    return entry, axes.replace(name, "")
