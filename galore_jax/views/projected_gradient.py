"""A gradient that was never formed: its projection, and the basis it was projected onto."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.leaves import OneLeaf

# A power of two: scaling by it is exact.
_TINY = 2.0**-60
# Of squared norms; a hundred times what is lost in fp32.
_ROUNDING = 1e-4


def _squared_norm(basis: jax.Array) -> jax.Array:
    return jnp.sum(basis * basis, axis=(-2, -1))


@jax.tree_util.register_pytree_with_keys_class
class ProjectedGradient(OneLeaf):
    """A gradient that is already projected, together with the basis it was taken in.

    Stands for the leaf gradient ``value @ basisᵀ`` in a gradient tree; the lens takes it as one
    leaf and skips its own refresh and projection. ``update`` then needs ``params``, because the
    leaf's full shape is not written here.

    Transformations in front of a lens see the arrays in here as leaves. The basis travels at 2⁻⁶⁰
    of its size, next to numbers that say so: a norm over all leaves is the norm of the values,
    and whatever multiplies all leaves by one factor (a clip by global norm) or poisons them all
    leaves the basis what it was.

    Args:
      value: ``[*batch, kept, rank]``, the projected gradient R = G·P.
      basis: ``[*batch, projected, rank]``, orthonormal columns P.
      moved: ``bool[*batch]``, which bases are new, from whoever ran the refresh of the lens: they
        are taken as they are. None: those that differ from the stored ones are new, and the
        transport of the lens may turn them.
      used: ``bool[*batch]``, which matrices took part in a product at all; None: all. To the
        gradient of one that did not, which is zero, another may be added.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> gradient, basis = jnp.ones((6, 4)), jnp.eye(4, 2)   # [kept, projected], P
      >>> gj.ProjectedGradient(gradient @ basis, basis).value.shape
      (6, 2)
    """

    value: jax.Array

    def __init__(
        self,
        value: jax.Array,
        basis: jax.Array,
        moved: jax.Array | None = None,
        used: jax.Array | None = None,
    ):
        for name, array in (("value", value), ("basis", basis)):
            if not (hasattr(array, "shape") and hasattr(array, "dtype")):
                raise TypeError(
                    f"`{name}` of a ProjectedGradient must be an array, got {array!r}. A gradient "
                    "without a basis is no projected one: pass the gradient itself."
                )
        if basis.dtype == jnp.float16:
            basis = basis.astype(jnp.float32)  # whose exponents reach down to where it travels
        dtype = basis.dtype
        self.value = value
        self._basis = basis * jnp.asarray(_TINY, dtype)
        unit = jnp.full(basis.shape[:-2], _TINY, dtype)
        self._unit = unit if used is None else jnp.where(used, unit, jnp.zeros((), dtype))
        # Of a basis that is new the squared norm travels along: a sum of several has another one.
        squared = _squared_norm(basis) * jnp.asarray(_TINY, dtype)
        self._moved = None if moved is None else jnp.where(moved, squared, jnp.zeros((), dtype))

    @property
    def basis(self) -> jax.Array:
        """``[*batch, projected, rank]``; zero where there is none, see `has_basis`."""
        return self._basis / self._unit_or_one[..., None, None]

    @property
    def has_basis(self) -> jax.Array:
        """``bool[*batch]``; not of a gradient times zero, or of a weight without a product."""
        return self._unit != 0

    @property
    def _unit_or_one(self) -> jax.Array:
        return jnp.where(self.has_basis, self._unit, jnp.ones_like(self._unit))

    @property
    def moved(self) -> jax.Array | None:
        """``bool[*batch]``, or None if nobody said."""
        return None if self._moved is None else self._moved != 0

    @property
    def is_sum(self) -> jax.Array:
        """``bool[*batch]``, whether a basis that is new is a mean of several.

        That is what becomes of a sum of gradients over micro-batches that each found one.
        """
        assert self._moved is not None
        squared = _squared_norm(self.basis)
        alike = jnp.abs(squared - self._moved / self._unit_or_one) <= _ROUNDING * squared
        return (self._moved != 0) & ~alike

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], None]:
        fields = {
            "value": self.value,
            "basis": self._basis,
            "unit": self._unit,
            "moved": self._moved,
        }
        return [(jax.tree_util.GetAttrKey(name), x) for name, x in fields.items()], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> ProjectedGradient:
        gradient = object.__new__(cls)
        gradient.value, gradient._basis, gradient._unit, gradient._moved = children
        return gradient

    def __repr__(self) -> str:
        return f"ProjectedGradient(value={self.value}, basis={self.basis}, moved={self.moved})"
