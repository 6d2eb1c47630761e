"""A product with a weight as a contraction of named axes, and what its gradient is known by."""

from __future__ import annotations

import dataclasses
import itertools
import string
from typing import Any

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
      precision: Of this product and those of its backward pass.
    """

    x: str
    w: str
    y: str
    precision: jax.lax.PrecisionLike = None

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum(f"{self.x},{self.w}->{self.y}", x, w, precision=self.precision)

    def cotangent_of_x(self, x: jax.Array, w: jax.Array, dy: jax.Array) -> jax.Array:
        """dL/dx."""
        (dx,) = jax.linear_transpose(lambda x: self(x, w), x)(dy)
        return dx


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
    """Of `jax.numpy.einsum`; an ellipsis may stand for axes of x and of the result."""
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


def dot_contraction(
    x_ndim: int, w_ndim: int, dimension_numbers: Any, precision: jax.lax.PrecisionLike = None
) -> Contraction:
    """Of `jax.lax.dot_general`: axes of the batch first, then those of x, then those of w."""
    (x_sum, w_sum), (x_batch, w_batch) = dimension_numbers
    x, w = list(_NAMES[:x_ndim]), string.ascii_lowercase[:w_ndim]
    for here, there in zip((*x_sum, *x_batch), (*w_sum, *w_batch), strict=True):
        x[here] = w[there]
    gone = {w[axis] for axis in (*w_sum, *w_batch)}
    y = [w[axis] for axis in w_batch] + [name for name in (*x, *w) if name not in gone]
    return Contraction("".join(x), w, "".join(y), precision)


@dataclasses.dataclass(frozen=True)
class ProjectedContraction:
    """The backward pass of a product, which never forms the gradient G of its weight.

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
          precision: Of the products; that of the forward pass unless told.
        """
        precision = self.product.precision if precision is None else precision
        batch, kept, projected = map(self._names, ("batch", "kept", "projected"))
        near, far = (x, self.product.x), (dy, self.product.y)
        if projected[0] not in self.product.x:
            near, far = far, near
        factor = self.view.unflatten(basis, self.view.projected)
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
            return MatrixOperator(
                shape=(one.view.kept_size, one.view.projected_size),
                dtype=dtype,
                matmul=lambda v: one.project(a, b, v, HIGHEST),
                rmatmul=lambda u: other.project(a, b, u, HIGHEST),
                largest=lambda: one._bound(a, b),
                projects_input=one.view.projects_input,
            )

        return matrix

    def _entry(
        self, x: jax.Array, dy: jax.Array, index: jax.Array
    ) -> tuple[ProjectedContraction, jax.Array, jax.Array]:
        """The product that one matrix of a batch takes part in."""
        x_axes, w_axes, y_axes = self.product.x, self.product.w, self.product.y
        for name, position in zip(self._names("batch"), self.view.positions(index), strict=True):
            x, x_axes = _take(x, x_axes, name, position)
            dy, y_axes = _take(dy, y_axes, name, position)
            w_axes = w_axes.replace(name, "")
        return ProjectedContraction(Contraction(x_axes, w_axes, y_axes), self.view.unbatched), x, dy

    def _bound(self, x: jax.Array, dy: jax.Array) -> jax.Array:
        """At least the largest entry of the matrix; zero or not finite if all its terms are."""
        matrix = self._names("kept") + self._names("projected")

        def largest(array: jax.Array, axes: str) -> tuple[str, jax.Array]:
            within = [axis for axis, name in enumerate(axes) if name in matrix]
            rows = "".join(name for name in axes if name not in matrix)
            return rows, jnp.max(jnp.abs(array), axis=within)

        (x_rows, x), (dy_rows, dy) = largest(x, self.product.x), largest(dy, self.product.y)
        return jnp.einsum(f"{x_rows},{dy_rows}->", x, dy, precision=HIGHEST)

    def _names(self, side: str) -> str:
        return "".join(self.product.w[axis] for axis in getattr(self.view, side))


def check_sizes(product: Contraction, x_shape: tuple[int, ...], plan: LeafPlan) -> None:
    """Raises unless the axes that activations and weight have in common are of the same size.

    One entry along a batch axis may stand for all, as anywhere; `jax.numpy.einsum` would take it
    for any axis.
    """
    assert plan.view is not None
    batch = {product.w[axis] for axis in plan.view.batch}
    sizes = dict(zip(product.x, x_shape, strict=True))
    for name, size in zip(product.w, plan.shape, strict=True):
        if sizes.get(name, size) not in ((1, size) if name in batch else (size,)):
            raise ValueError(
                f"leaf {plan.path!r} of shape {plan.shape} does not fit activations of shape "
                f"{x_shape} in {product.x},{product.w}->{product.y}."
            )


def projected_contraction(product: Contraction, plan: LeafPlan) -> ProjectedContraction:
    """The backward pass of `product` for a leaf.

    Raises:
      ValueError: The matrix axes of the leaf are not the two sides of the product.
    """
    assert plan.view is not None
    found = ProjectedContraction(product, plan.view)
    batch, *sides = (set(found._names(side)) for side in ("batch", "kept", "projected"))
    x, y = set(product.x), set(product.y)
    contracted, produced = x - y - batch, y - x - batch
    contracted &= set(product.w)
    if sides not in ([contracted, produced], [produced, contracted]) or not batch <= x | y:
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
