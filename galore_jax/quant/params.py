"""Whole trees of weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from galore_jax.leaves import Leaves, abstract
from galore_jax.meshes import with_auto_axes
from galore_jax.quant.array import QuantizedArray, check_format, dequantize, quantize
from galore_jax.views.shardings import sharded_parts, shardings_per_leaf
from galore_jax.views.targets import Targets, is_target, targets_rule


def quantize_params(
    params: Any, *, bits: int = 8, block: int = 256, targets: Targets = None
) -> Any:
    """Stores the matrices of a model in integer codes, rounded to nearest.

    By default embeddings, output head, norms and biases stay as they are, and so does everything
    with fewer than two axes: what GaLore does not project, it does not quantize either.

    Update such parameters with `galore_jax.apply_updates`, which rounds stochastically, and
    differentiate with `galore_jax.quant.value_and_grad`. `optax.apply_updates`, and with it
    `flax.nnx.Optimizer` and `TrainState`, cannot add to codes.

    Args:
      params: Tree of parameters.
      bits: 8 or 4.
      block: Entries per block, along the last axis.
      targets: Which leaves: None for the rule above, a regex searched in the path, or a
        ``callable(path, leaf) -> bool``.

    Returns:
      The tree with a `QuantizedArray` in the place of each chosen leaf.

    Raises:
      TypeError: A leaf that `targets` names is not a real floating array.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> params = {"embed": jnp.ones((512, 64)), "up": jnp.ones((64, 256))}
      >>> gj.quant.quantize_params(params)["up"]
      QuantizedArray(shape=(64, 256), bits=8, block=256, dtype=float32)
    """
    block = check_format(bits, block)
    targets_rule(targets)

    def quantize_leaf(name: str, leaf: Any) -> Any:
        shape = abstract(leaf).shape
        if len(shape) < 2 or 0 in shape or not is_target(targets, name, leaf):
            return leaf
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            if targets is None:
                return leaf
            raise TypeError(
                f"leaf {name!r} has dtype {leaf.dtype}: only real floating arrays are quantized. "
                "Leave it out of `targets`."
            )
        return _quantize_in_place(dequantize(leaf), bits, block)

    leaves = Leaves.of(params)
    return leaves.boxed(list(map(quantize_leaf, leaves.paths, leaves.values)))


def dequantize_params(params: Any) -> Any:
    """The tree with every `QuantizedArray` decoded.

    Also what to hand to the ``init`` of a transformation that is not of this library: it would take
    the codes for parameters. Under `jax.eval_shape` or `jax.jit` that costs no memory.

    Args:
      params: Tree of parameters.

    Returns:
      A tree of arrays.

    Example:
      >>> import jax.numpy as jnp, optax, galore_jax as gj
      >>> params = gj.quant.quantize_params({"up": jnp.ones((64, 256))})
      >>> state = optax.scale_by_adam().init(gj.quant.dequantize_params(params))
      >>> state.mu["up"].shape
      (64, 256)
    """
    return jax.tree.map(dequantize, params, is_leaf=lambda node: isinstance(node, QuantizedArray))


def params_sharding(params: Any, params_sharding: Any) -> Any:
    """Shardings of the arrays of a tree with quantized leaves.

    The parts of a `QuantizedArray` are sharded like the array it stands for. An axis of a part
    that the mesh does not divide (there are fewer blocks than entries) is replicated.

    Args:
      params: Parameters or their `ShapeDtypeStruct`s, some of them `QuantizedArray`s.
      params_sharding: Tree like `params` with a `NamedSharding` for each leaf, all on one mesh.

    Returns:
      A tree like `params` with a `NamedSharding` for each array; other leaves keep theirs. Give it
      to `jax.jit` as ``in_shardings`` or ``out_shardings``, or to `jax.device_put`.

    Raises:
      ValueError: The trees do not match, or a mesh axis does not divide a leaf.
      TypeError: A sharding is not a `NamedSharding`.

    Example:
      >>> import functools, jax, jax.numpy as jnp, galore_jax as gj
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> params, specs = {"up": jnp.ones((64, 256))}, {"up": NamedSharding(mesh, P("fsdp"))}
      >>> quantize = functools.partial(gj.quant.quantize_params, bits=4)
      >>> shardings = gj.quant.params_sharding(jax.eval_shape(quantize, params), specs)
      >>> quantized = jax.jit(quantize, out_shardings=shardings)(params)
      >>> quantized["up"].codes.sharding.spec
      P('fsdp',)
    """
    leaves, shardings = Leaves.of(params), shardings_per_leaf(params, params_sharding)
    return leaves.boxed(
        [
            sharded_parts(leaf, sharding) if isinstance(leaf, QuantizedArray) else sharding
            for leaf, sharding in zip(leaves.values, shardings, strict=True)
        ]
    )


def _quantize_in_place(x: jax.Array, bits: int, block: int) -> QuantizedArray:
    """Codes where the entries are: on an explicit mesh, too, where blocks may span devices."""
    to_codes = _to_codes(bits, block)
    parts = sharded_parts(jax.eval_shape(to_codes, abstract(x)), jax.typeof(x).sharding)
    return with_auto_axes(to_codes, x, like=parts)


@functools.cache
def _to_codes(bits: int, block: int) -> Callable[[jax.Array], QuantizedArray]:
    return functools.partial(quantize, bits=bits, block=block)
