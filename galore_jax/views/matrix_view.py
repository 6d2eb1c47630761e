"""A leaf seen as a batch of matrices [kept, projected], and the two products with a basis."""

from __future__ import annotations

import dataclasses
import functools
import math
import string
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from galore_jax.views.axes import MatrixAxes, as_tuple

Side = Literal["short", "long", "input", "output"]


def check_side(side: str) -> None:
    """Raises on anything but the four sides."""
    if side not in get_args(Side):
        raise ValueError(
            f"unknown side {side!r}: choose 'short' (project the shorter matrix axis, the paper), "
            "'long' (the longer one, optax.contrib), 'input' (reduction axis) or 'output'."
        )


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """The batch, kept and projected axes of a leaf.

    After this, left and right no longer exist: a gradient is ``[*batch, kept, projected]``, a
    basis ``[*batch, projected, rank]`` and a low-rank array ``[*batch, kept, rank]``.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    kept: tuple[int, ...]
    projected: tuple[int, ...]
    projects_input: bool

    @functools.cached_property
    def batch_shape(self) -> tuple[int, ...]:
        return self._sizes(self.batch)

    @functools.cached_property
    def num_matrices(self) -> int:
        return math.prod(self.batch_shape)

    @functools.cached_property
    def kept_size(self) -> int:
        return math.prod(self._sizes(self.kept))

    @functools.cached_property
    def projected_size(self) -> int:
        return math.prod(self._sizes(self.projected))

    def basis_shape(self, rank: int) -> tuple[int, ...]:
        return (*self.batch_shape, self.projected_size, rank)

    def low_rank_shape(self, rank: int) -> tuple[int, ...]:
        return (*self.batch_shape, self.kept_size, rank)

    def entry(self, leaf: jax.Array, index: jax.Array | int = 0) -> jax.Array:
        """Entry number `index` along the flattened batch axes, in the leaf's own axis order."""
        if not self.batch:
            return leaf
        for axis, position in sorted(zip(self.batch, self.positions(index), strict=True))[::-1]:
            leaf = jax.lax.dynamic_index_in_dim(leaf, position, axis, keepdims=False)
        return leaf

    @functools.cached_property
    def unbatched(self) -> MatrixView:
        """The view of one `entry`."""
        return self._without(self.batch)

    def inside(self, axes: int) -> MatrixView:
        """The view of what is left when the first `axes` axes, all of them batch axes, are indexed.

        Raises:
          ValueError: One of them is kept or projected.
        """
        if not set(range(axes)) <= set(self.batch):
            raise ValueError(
                f"axes {tuple(range(axes))} of shape {self.shape} are not all batch axes "
                f"{self.batch}"
            )
        return self._without(tuple(range(axes)))

    def _without(self, indexed: tuple[int, ...]) -> MatrixView:
        """The view of what is left when some batch axes are indexed."""
        left = tuple(axis for axis in range(len(self.shape)) if axis not in indexed)

        def moved(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(left.index(axis) for axis in axes if axis in left)

        batch, kept, projected = map(moved, (self.batch, self.kept, self.projected))
        return MatrixView(self._sizes(left), batch, kept, projected, self.projects_input)

    @functools.cached_property
    def transposed(self) -> MatrixView:
        """The view with kept and projected axes exchanged."""
        return dataclasses.replace(
            self, kept=self.projected, projected=self.kept, projects_input=not self.projects_input
        )

    def to_matrices(self, leaf: jax.Array) -> jax.Array:
        """``[*batch, kept, projected]``; transposes, which `project` does not."""
        matrices = leaf.transpose(self.batch + self.kept + self.projected)
        return matrices.reshape(*self.batch_shape, self.kept_size, self.projected_size)

    def project(
        self,
        leaf: jax.Array,
        basis: jax.Array,
        precision: jax.lax.PrecisionLike = None,
    ) -> jax.Array:
        """R = G·P, ``[*batch, kept, rank]``; accumulates in the basis dtype."""
        batch, kept, projected, full = self._letters
        product = functools.partial(
            jnp.einsum, precision=precision, preferred_element_type=basis.dtype
        )
        # XLA's CPU backend compiles some bf16 products over several axes that it then cannot run:
        # those whose result has its axes in another order than the leaf, of what was seen. Where
        # the result has to be transposed, a barrier keeps XLA from folding that back.
        if self.batch + self.projected + self.kept == tuple(range(leaf.ndim)):
            # Pᵀ·G: contracting the leading axis of a matrix as a left operand takes up to 1.7 times
            # longer on CPU.
            leaf = self.transposed.to_matrices(leaf)
            low_rank = product("...pZ,...pk->...Zk", basis.astype(leaf.dtype), leaf)
            low_rank = jax.lax.optimization_barrier(low_rank).mT
        else:
            in_order = "".join(sorted(kept))
            factor = self.unflatten(basis, self.projected).astype(leaf.dtype)
            low_rank = product(f"{full},{batch}{projected}Z->{batch}{in_order}Z", leaf, factor)
            if in_order != kept:
                low_rank = jax.lax.optimization_barrier(low_rank)
                low_rank = jnp.einsum(f"{batch}{in_order}Z->{batch}{kept}Z", low_rank)
        return low_rank.reshape(self.low_rank_shape(basis.shape[-1]))

    def lift(self, low_rank: jax.Array, basis: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """N·Pᵀ in the leaf's own shape and axis order."""
        batch, kept, projected, full = self._letters
        factors = [
            (f"{batch}{kept}Z", self.unflatten(low_rank, self.kept).astype(dtype)),
            (f"{batch}{projected}Z", self.unflatten(basis, self.projected).astype(dtype)),
        ]
        # The factor whose axes come first in the leaf goes first: no transposed full-size result.
        if min(self.projected) < min(self.kept):
            factors.reverse()
        (left, a), (right, b) = factors
        return jnp.einsum(f"{left},{right}->{full}", a, b, preferred_element_type=dtype)

    def _sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)

    @functools.cached_property
    def _letters(self) -> tuple[str, str, str, str]:
        sides = self.batch, self.kept, self.projected, range(len(self.shape))
        batch, kept, projected, full = (
            "".join(string.ascii_lowercase[axis] for axis in axes) for axes in sides
        )
        return batch, kept, projected, full

    def unflatten(self, array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        """``[*batch, n, k]`` with the `axes` that its axis of length n consists of."""
        return array.reshape(*self.batch_shape, *self._sizes(axes), array.shape[-1])

    def positions(self, index: jax.Array | int) -> tuple[jax.Array | int, ...]:
        """Entry number `index` along the flattened batch axes, as one position per batch axis."""
        positions: list[jax.Array | int] = []
        for size in reversed(self.batch_shape[1:]):
            positions.append(index % size)
            index = index // size
        return (index, *reversed(positions)) if self.batch else ()


def matrix_view(shape: tuple[int, ...], axes: MatrixAxes, side: Side) -> MatrixView:
    """Resolves axes and side for one leaf shape.

    Args:
      shape: Shape of the leaf.
      axes: Which axes form its matrix; may count from the end.
      side: Which matrix side is projected; a square matrix is projected on its input side.

    Raises:
      ValueError: An axis does not exist in `shape`, or two names mean the same axis.
    """
    reduction = tuple(_resolve(axis, shape, axes) for axis in as_tuple(axes.reduction_axis))
    output = tuple(_resolve(axis, shape, axes) for axis in as_tuple(axes.output_axis))
    if len(set(reduction + output)) != len(reduction + output):
        raise ValueError(f"{axes} names one axis of shape {shape} twice.")
    sizes = [math.prod(shape[axis] for axis in side_axes) for side_axes in (reduction, output)]
    projects_input = {
        "short": sizes[0] <= sizes[1],
        "long": sizes[0] >= sizes[1],
        "input": True,
        "output": False,
    }[side]
    projected, kept = (reduction, output) if projects_input else (output, reduction)
    batch = tuple(axis for axis in range(len(shape)) if axis not in reduction + output)
    return MatrixView(shape, batch, kept, projected, projects_input)


def _resolve(axis: int, shape: tuple[int, ...], axes: MatrixAxes) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"{axes} names axis {axis}, but the leaf has shape {shape} ({len(shape)} axes). Give "
            "this leaf its own entry with a {path regex: MatrixAxes} dict."
        )
    return axis % len(shape)
