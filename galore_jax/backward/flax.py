"""Products and promotion for layers of Flax, in the places of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.backward.contraction import dot_contraction
from galore_jax.backward.weight import ProjectedWeight, product
from galore_jax.quant.weight import Weight, decoded

Axes = Sequence[int]


def dot_general(
    x: jax.Array,
    w: Any,
    dimension_numbers: tuple[tuple[Axes, Axes], tuple[Axes, Axes]],
    precision: jax.lax.PrecisionLike = None,
    **options: Any,
) -> jax.Array:
    """`jax.lax.dot_general` of activations and a weight of any form, for ``dot_general=`` of Flax.

    Args:
      x: The activations.
      w: See `galore_jax.matmul`.
      dimension_numbers: Contracted axes of x and w, and batch axes of both.
      precision: Of the product, and of those in its backward pass.
      **options: Others of `jax.lax.dot_general`; for arrays only, unless they are None.

    Returns:
      The result, in the dtype of `x` if `w` is projected.

    Raises:
      ValueError: Axes of a projected leaf that are not those of the product, or an option.

    Example:
      A layer that works with arrays, INT8 weights and projected ones, `flax.nnx.Linear` with
      ``promote_dtype=gj.backward.promote_dtype, dot_general=gj.backward.dot_general``, computes

      >>> import jax.numpy as jnp, galore_jax as gj
      >>> x, kernel = jnp.ones((2, 5, 16)), jnp.ones((16, 64))
      >>> gj.backward.dot_general(x, kernel, (((2,), (0,)), ((), ()))).shape
      (2, 5, 64)
    """
    if not isinstance(w, ProjectedWeight):
        array = decoded(w, w.dtype)
        return jax.lax.dot_general(x, array, dimension_numbers, precision=precision, **options)
    given = sorted(name for name, value in options.items() if value is not None)
    if given:
        raise ValueError(
            f"leaf {w.path!r} is projected in the backward pass, and its product takes no "
            f"{given}: leave them out, or keep the leaf out of `targets`."
        )
    return product(dot_contraction(jnp.ndim(x), w.ndim, dimension_numbers, precision), x, w)


def promote_dtype(*args: Any, dtype: Any = None, inexact: bool = True) -> Any:
    """Casts arrays to one dtype and leaves weights of other forms as they are.

    For ``promote_dtype=`` of Flax: NNX passes a tuple, linen the arrays one by one.

    Args:
      *args: Arrays, weights of any form and None.
      dtype: The dtype; None takes what JAX promotes all of them to.
      inexact: Whether it has to be a floating one.

    Returns:
      The tuple of them.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> x, kernel = jnp.ones(4, jnp.bfloat16), gj.quant.quantize(jnp.ones((4, 2)))
      >>> x, kernel, bias = gj.backward.promote_dtype((x, kernel, None))
      >>> x.dtype.name, type(kernel).__name__, bias
      ('float32', 'QuantizedArray', None)
    """
    things = args[0] if len(args) == 1 and isinstance(args[0], tuple) else args
    if dtype is None:
        dtype = jnp.result_type(*(thing.dtype for thing in things if thing is not None))
        if inexact and not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(jnp.float32, dtype)
    return tuple(
        thing if thing is None or isinstance(thing, Weight) else jnp.asarray(thing, dtype)
        for thing in things
    )
