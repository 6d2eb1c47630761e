"""Running a function on meshes whose axes are explicit.

On such a mesh (the default of `jax.make_mesh`) every operation has to say how its result is
sharded when that is ambiguous, as it is for a contraction over a sharded axis, and factorizations
refuse sharded operands. What is done here does not care: results are sharded like arguments, and
everything between is left to the compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding


def with_auto_axes(fn: Callable[..., Any], *args: Any, like: Any) -> Any:
    """``fn(*args)`` with automatic sharding inside, also on an explicit mesh.

    Args:
      fn: A function of pytrees of arrays; the same object at every call, or it is compiled anew.
      *args: Its arguments.
      like: Tree of arrays like the result, which is sharded like them, or of their shardings.
    """
    mesh = _explicit_mesh(args)
    if mesh is None:
        return fn(*args)
    specs, treedef = jax.tree.flatten(jax.tree.map(_spec, like))
    return _automatic(fn, mesh, tuple(specs), treedef, *args)


def preserve_sharding(
    update: Callable[..., tuple[Any, Any]], like: Callable[[Any, Any], Any]
) -> Callable[..., tuple[Any, Any]]:
    """An `update` for any mesh: the state comes out sharded as it was.

    Args:
      update: Of a gradient transformation with extra arguments.
      like: ``(gradients, params)`` -> arrays that the updates are sharded like.
    """

    def with_extra_args(updates: Any, state: Any, params: Any, extra_args: dict[str, Any]) -> Any:
        return update(updates, state, params, **extra_args)

    def wrapped(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        args = updates, state, params, extra_args
        if _explicit_mesh(args) is None:
            return update(updates, state, params, **extra_args)
        return with_auto_axes(with_extra_args, *args, like=(like(updates, params), state))

    return wrapped


# jit: outside of one there may be no mesh to compile for.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _automatic(fn: Any, mesh: Any, specs: Any, treedef: Any, *args: Any) -> Any:
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(fn, out_sharding=jax.tree.unflatten(treedef, specs))(*args)


def _spec(like: Any) -> Any:
    return (like if isinstance(like, NamedSharding) else jax.typeof(like).sharding).spec


def _explicit_mesh(tree: Any) -> Any:
    for leaf in jax.tree.leaves(tree):
        if not isinstance(leaf, jax.Array):
            continue
        mesh = getattr(jax.typeof(leaf).sharding, "mesh", None)
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            return getattr(mesh, "abstract_mesh", mesh)
    return None
