"""How often the subspaces of a model have moved, and how far."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax.transforms.lenses import find_lenses
from galore_jax.transforms.state import LowRankState
from galore_jax.views.leaves import flatten_leaves, leaf_paths, unboxed


class SubspaceMetrics(NamedTuple):
    r"""The subspaces of one leaf, one entry per matrix of a stack.

    Args:
      refreshes: ``int32[*batch]``, how often each basis has been recomputed.
      gap: ``int32[*batch]``, steps between two refreshes as the policy has it now; zero if the
        policy has none.
      overlap: ``float32[*batch]``, the share :math:`\|P_{old}^\top P_{new}\|_F^2 / r` of the
        subspace before the last refresh that lies in the one after it: one if it held still, rank /
        projected on average if the two have nothing to do with each other. Zero until there have
        been two refreshes.
    """

    refreshes: jax.Array
    gap: jax.Array
    overlap: jax.Array


def metrics(opt_state: Any) -> dict[str, SubspaceMetrics]:
    """How often each subspace has moved, how far, and when it is expected to move again.

    Reads what the state holds and computes nothing: the overlap is taken during a refresh, which
    has both bases at hand, and costs it one product of rank × projected × rank. Works under `jit`,
    on state in shards, and on the state of any chain, mask, partition or wrapper. The arrays are
    copies: they outlive a state whose buffers are donated.

    Args:
      opt_state: State of any optax transformation.

    Returns:
      For each projected leaf its `SubspaceMetrics`, by path; empty without a lens.

    Raises:
      ValueError: Two lenses project leaves of the same path.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> params = {"blocks": jnp.ones((3, 64, 128)), "bias": jnp.ones((128,))}
      >>> tx = gj.galore_adamw(1e-2, rank=8, update_proj_gap=50, axes=gj.MatrixAxes())
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> seen = gj.metrics(state)["blocks"]
      >>> seen.refreshes.tolist(), seen.gap.tolist(), seen.overlap.tolist()
      ([1, 1, 1], [50, 50, 50], [0.0, 0.0, 0.0])
    """
    found: dict[str, SubspaceMetrics] = {}
    for lens in find_lenses(opt_state):
        for path, seen in _of_lens(unboxed(lens)):
            if path in found:
                raise ValueError(
                    f"leaf {path!r} is projected by two lenses of this state, perhaps because it "
                    "holds several optimizers: ask about the state of each of them."
                )
            found[path] = seen
    return found


def _of_lens(lens: LowRankState) -> Iterator[tuple[str, SubspaceMetrics]]:
    """The projected leaves of one lens."""
    state = lens.refresh_state
    refreshes, treedef = flatten_leaves(state.refreshes)
    trees = lens.projectors, state.places, state.overlap
    projectors, places, overlaps = map(treedef.flatten_up_to, trees)
    projected = [any(part.ndim > 0 for part in jax.tree.leaves(stored)) for stored in projectors]
    gaps = lens.config.refresh.gaps(
        [place if mine else None for place, mine in zip(places, projected, strict=True)],
        state.memory,
    )
    leaves = zip(leaf_paths(state.refreshes), refreshes, gaps, overlaps, strict=True)
    for path, refreshed, gap, overlap in leaves:
        if gap is not None:
            yield path, SubspaceMetrics(*map(jnp.copy, (refreshed, gap, overlap)))
