"""Shardings of an optimizer state, from those of the parameters."""

from __future__ import annotations

from typing import Any

import jax
import optax

from galore_jax.leaves import Leaves
from galore_jax.quant import dequantize_params
from galore_jax.transforms.lenses import abstract_state
from galore_jax.transforms.state_tree import sharding_of, state_arrays
from galore_jax.views.shardings import shardings_per_leaf


def state_sharding(
    tx: optax.GradientTransformation,
    params: Any,
    params_sharding: Any,
    *,
    spread: bool = False,
) -> Any:
    """Shardings of the state of any optimizer, from those of its parameters.

    A moment of a leaf that is not projected is sharded like its parameter. Of a projected leaf,
    with P the mesh axes of its projected matrix axis and K those of the other one, a basis
    ``[*batch, projected, rank]`` is sharded ``(*batch, P, None)`` and a low-rank moment
    ``[*batch, kept, rank]`` ``(*batch, K, None)``. Flags, counts and scalars are replicated, and so
    is an axis that the mesh does not divide.

    Finds lenses and parameter-shaped trees wherever they are: in chains, masks, partitions,
    `inject_hyperparams`, `MultiSteps`, `apply_if_finite`, with 8-bit moments and INT4 bases.

    Pin the result, and the parameters' shardings with it, where they leave the jitted step:
    ``jax.jit(step, out_shardings=(params_sharding, state_sharding(...)))``. What is not pinned the
    compiler lays out as it likes: with `spread`, updates come out like the spread moments and no
    longer like the parameters, and the second step is compiled anew.

    Args:
      tx: Any optax transformation.
      params: Parameters or their `ShapeDtypeStruct`s; `quant.QuantizedArray`s count as the arrays
        they stand for, as in ``tx.init(quant.dequantize_params(params))``.
      params_sharding: Tree like `params` with a `NamedSharding` for each leaf.
      spread: Also use P for the kept axis of low-rank moments, which are otherwise replicated over
        it, at the price of gathering one rank-sized array per step. Worth it when weights are
        sharded along their projected axis.

    Returns:
      A tree like ``tx.init(params)`` with a `NamedSharding` for each array.

    Raises:
      ValueError: The trees do not match, a mesh axis does not divide a parameter, or there are
        several meshes.
      TypeError: A sharding is not a `NamedSharding`.

    Example:
      >>> import jax, jax.numpy as jnp, galore_jax as gj
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> params = {"w": jnp.ones((64, 128))}
      >>> shardings = {"w": NamedSharding(mesh, P(None, "fsdp"))}
      >>> tx = gj.galore_adamw(1e-2, rank=8)
      >>> state = gj.state_sharding(tx, params, shardings)
      >>> tuple(state[0].inner_state.mu["w"].spec), tuple(state[0].projectors["w"].spec)
      (('fsdp', None), (None, None))
    """
    shardings = shardings_per_leaf(params, params_sharding)
    if not shardings:
        raise ValueError("there is no parameter to take a mesh from.")
    leaves = Leaves.of(params)
    arrays = state_arrays(abstract_state(tx, leaves), leaves)
    return jax.tree.map(lambda array: sharding_of(array, shardings, spread=spread), arrays)


def init_sharded(
    tx: optax.GradientTransformation,
    params: Any,
    params_sharding: Any,
    *,
    spread: bool = False,
) -> Any:
    """``tx.init(params)``, created in shards: no device ever holds the whole state.

    Who calls ``init`` himself, as `flax.nnx.Optimizer` and `TrainState.create` do, is given
    ``tx._replace(init=lambda params: init_sharded(tx, params, params_sharding))``. Logical axes
    become `params_sharding` with `flax.nnx.get_named_sharding` or, in linen, with
    ``logical_to_mesh_sharding(get_partition_spec(params), mesh, rules)``.

    Args:
      tx: Any optax transformation.
      params: Parameters; `quant.QuantizedArray`s are decoded for `tx`.
      params_sharding: Tree like `params` with a `NamedSharding` for each leaf.
      spread: See `state_sharding`.

    Returns:
      The state of `tx`.

    Raises:
      ValueError: The trees do not match, a mesh axis does not divide a parameter, or there are
        several meshes.

    Example:
      >>> import jax, jax.numpy as jnp, galore_jax as gj
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> params = {"w": jnp.ones((64, 128))}
      >>> state = gj.init_sharded(
      ...     gj.galore_adamw(1e-2, rank=8), params, {"w": NamedSharding(mesh, P("fsdp"))}
      ... )
      >>> tuple(state[0].projectors["w"].sharding.spec)
      ('fsdp', None)
    """
    shardings = state_sharding(tx, params, params_sharding, spread=spread)
    return jax.jit(lambda p: tx.init(dequantize_params(p)), out_shardings=shardings)(params)
