"""The shardings that a user gives, one for each leaf, and those of the parts of a leaf."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from galore_jax.leaves import Leaves, is_one_leaf, unboxed
from galore_jax.tables import paths_text
from galore_jax.views.specs import axis_names, entry_of, shards, that_divides


def shardings_per_leaf(params: Any, params_sharding: Any) -> list[NamedSharding]:
    """The sharding of every leaf, in flattening order.

    Args:
      params: Parameters or their `ShapeDtypeStruct`s.
      params_sharding: Tree like `params`, with or without its boxes, with a `NamedSharding` for
        each leaf; a stored leaf may have one for each of its parts.

    Raises:
      ValueError: The trees do not match, a sharding does not fit its leaf, or there are two meshes.
      TypeError: A sharding is not a `NamedSharding`.
    """
    leaves = Leaves.of(params)
    try:
        nodes = leaves.split(params_sharding)
    except (ValueError, TypeError):
        raise ValueError(
            f"`params_sharding` does not match the parameters: {_mismatch(leaves, params_sharding)}"
            ". It needs a NamedSharding in the place of every leaf."
        ) from None
    shardings = list(map(_lone, leaves.paths, nodes))
    for path, like, sharding in zip(leaves.paths, leaves.shapes, shardings, strict=True):
        _check_fits(path, like.shape, sharding)
        if sharding.mesh != shardings[0].mesh:
            raise ValueError(
                f"leaf {path!r} is on {sharding.mesh}, but leaf {leaves.paths[0]!r} on "
                f"{shardings[0].mesh}. All parameters, and with them the state, live on one mesh."
            )
    return shardings


def sharded_parts(leaf: Any, sharding: NamedSharding) -> Any:
    """`leaf` with a sharding in the place of each of its arrays: all have its axes.

    Some are shorter along an axis (scales of blocks, two codes in a byte) and are replicated along
    it if the mesh does not divide it.
    """
    return jax.tree.map(lambda part: sharding_that_divides(sharding, part.shape), leaf)


def sharding_that_divides(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding over those mesh axes that divide the axes of an array."""
    spec = that_divides(sharding.spec, shape, dict(sharding.mesh.shape))
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def _lone(path: str, node: Any) -> NamedSharding:
    """The one sharding in the place of a leaf."""
    found = unboxed(node)
    if is_one_leaf(found):
        found = next(iter(jax.tree.leaves(found)), None)  # codes come first and have all axes
    if isinstance(found, NamedSharding):
        return found
    remedy = (
        "Say on which mesh: NamedSharding(mesh, spec)"
        if isinstance(found, PartitionSpec)
        else "To replicate it, NamedSharding(mesh, PartitionSpec())"
    )
    raise TypeError(f"leaf {path!r}: expected a NamedSharding, got {found!r}. {remedy}.")


def _mismatch(params: Leaves, params_sharding: Any) -> str:
    ours, theirs = params.paths, Leaves.of(params_sharding).paths
    missing = [repr(path) for path in ours if path not in theirs]
    unknown = [repr(path) for path in theirs if path not in ours]
    if missing or unknown:
        parts = [("no sharding for", missing), ("no parameter for", unknown)]
        return "; ".join(f"{what} {paths_text(paths)}" for what, paths in parts if paths)
    return f"{type(params_sharding).__name__} in the place of {type(params.given).__name__}"


def _check_fits(path: str, shape: tuple[int, ...], sharding: NamedSharding) -> None:
    spec, sizes = sharding.spec, dict(sharding.mesh.shape)
    if len(spec) > len(shape):
        raise ValueError(
            f"leaf {path!r} of shape {shape}: its spec {spec} has {len(spec)} entries for "
            f"{len(shape)} axes. Give it one entry per axis, or fewer."
        )
    for axis, size in enumerate(shape):
        entry = entry_of(spec, axis)
        if entry is PartitionSpec.UNCONSTRAINED:
            raise ValueError(
                f"leaf {path!r} of shape {shape}: axis {axis} is UNCONSTRAINED, from which nothing "
                "follows for the state. Name its mesh axes, or None."
            )
        if size % shards(entry, sizes):
            raise ValueError(
                f"leaf {path!r} of shape {shape}: axis {axis} has {size} entries, which the mesh "
                f"axes {axis_names(entry)} ({shards(entry, sizes)} shards) do not divide. Shard "
                "another axis, or none."
            )
