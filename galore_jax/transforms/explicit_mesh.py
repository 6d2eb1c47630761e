"""Running a transformation on meshes whose axes are explicit.

On such a mesh (the default of `jax.make_mesh`) every operation has to say how its result is sharded
when that is ambiguous, as it is for a contraction over a sharded axis, and factorizations refuse
sharded operands. An update does not care: its results are sharded like the gradients and the state
that it was given, and everything between is left to the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType

Update = Callable[..., tuple[Any, Any]]


def compiler_chooses(update: Update) -> Update:
    """`update(updates, state, params, **extra)` with automatic sharding inside.

    Updates come out sharded like the gradients, the state like the state. On a mesh without
    explicit axes this is `update` itself.
    """

    def wrapped(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        mesh = _explicit_mesh((updates, state))
        if mesh is None:
            return update(updates, state, params, **extra_args)
        automatic = jax.sharding.auto_axes(
            lambda *args: update(*args, **extra_args),
            out_sharding=jax.tree.map(_spec, (updates, state)),
        )

        def call(*args: Any) -> Any:
            with jax.sharding.use_abstract_mesh(mesh):
                return automatic(*args)

        # jit: outside of one there may be no mesh to compile for.
        return jax.jit(call)(updates, state, params)

    return wrapped


def _explicit_mesh(tree: Any) -> Any:
    for leaf in jax.tree.leaves(tree):
        mesh = getattr(jax.typeof(leaf).sharding, "mesh", None)
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def _spec(leaf: Any) -> jax.sharding.PartitionSpec:
    return jax.typeof(leaf).sharding.spec
