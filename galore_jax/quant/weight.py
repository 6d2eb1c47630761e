"""Weights that a model multiplies by without holding them as arrays, and the product with any."""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from galore_jax.leaves import OneLeaf


class Weight(OneLeaf):
    """A node that stands for a matrix, or a batch of matrices, and knows its product.

    Subclasses have the `shape` and `dtype` of the array that they stand for.
    """

    def decoded(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The array, as it enters products in `dtype`."""
        raise NotImplementedError

    def matmul(self, x: jax.Array) -> jax.Array:
        """`jax.numpy.matmul` of activations and the array, in the dtype of the activations."""
        return jnp.matmul(x, self.decoded(x.dtype))


def decoded(weight: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The array that a weight of any form stands for, as it enters products in `dtype`."""
    return weight.decoded(dtype) if isinstance(weight, Weight) else weight.astype(dtype)


def matmul(x: jax.Array, w: Any) -> jax.Array:
    """Activations times a weight, whatever the weight is stored as.

    Args:
      x: ``[..., in]``.
      w: ``[in, out]``: an array, a `quant.QuantizedArray`, or what `quant.value_and_grad` or
        `projected_value_and_grad` puts in its place. Leading axes broadcast as in
        `jax.numpy.matmul`.

    Returns:
      ``[..., out]`` in the dtype of `x`. The gradient with respect to a stored weight is that of
      the decoded one; a bare `QuantizedArray` is a constant.

    Raises:
      ValueError: The axes of a projected leaf are not those of the product.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> gj.matmul(jnp.ones((3, 4)), gj.quant.quantize(jnp.ones((4, 2)))).shape
      (3, 2)
    """
    return w.matmul(x) if isinstance(w, Weight) else jnp.matmul(x, w.astype(x.dtype))


class Label(str):
    """The path of a leaf, for messages: static data that differs in it alone counts as equal."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Label)

    def __hash__(self) -> int:
        return 0


class WrappedWeight(Weight):
    """A weight inside a function that is being differentiated: anything but a product is refused.

    Subclasses hold the weight that they stand for.
    """

    weight: Any

    @property
    def path(self) -> str:
        """The path of the leaf, for messages."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def astype(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The array, whose gradient is formed."""
        return self.decoded(dtype)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return self.matmul(x)

    # NumPy leaves operators to the methods here.
    __array_ufunc__ = None

    def __jax_array__(self) -> Any:
        # Operators of JAX arrays ask for this before they leave a product to `__rmatmul__`, so
        # that it may not raise itself.
        return _NoArray(self._refusal("no array"))

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(self._refusal("no array"))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_") or name in ("weight", "path", "plan"):  # asked for before they are
            raise AttributeError(name)
        raise AttributeError(self._refusal(f"without {name!r}"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(path={str(self.path)!r}, shape={self.shape})"

    def _refusal(self, what: str) -> str:
        return (
            f"leaf {str(self.path)!r} is a {type(self).__name__} here, {what}. Multiply with "
            "galore_jax.matmul, x @ w or galore_jax.backward.einsum, or ask for the array with "
            "w.astype(dtype), whose gradient is formed."
        )


def _no_arithmetic(self: WrappedWeight, *others: Any) -> NoReturn:
    raise TypeError(self._refusal("without arithmetic"))


for _name in """
    abs add ge gt le lt matmul mul neg pow radd rmul rpow rsub rtruediv sub truediv
""".split():  # noqa: SIM905
    setattr(WrappedWeight, f"__{_name}__", _no_arithmetic)


class _NoArray:
    """An object that raises as soon as anything about it is asked for, and is shown in errors."""

    def __init__(self, message: str):
        self.__dict__["message"] = message

    def __getattr__(self, name: str) -> NoReturn:
        raise TypeError(self.__dict__["message"])

    def __repr__(self) -> str:
        return self.__dict__["message"]
