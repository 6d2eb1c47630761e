"""GaLore with Lion."""

from __future__ import annotations

from typing import Any

import jax
import optax

from galore_jax.alias.base import with_decay_and_rate
from galore_jax.codecs import Codec
from galore_jax.mapped import AxisName
from galore_jax.projectors import Projector
from galore_jax.refresh import RefreshPolicy
from galore_jax.transforms import low_rank_projection
from galore_jax.transport import Transport
from galore_jax.views.matrix_view import Side
from galore_jax.views.plan import RankLike
from galore_jax.views.targets import Targets


def galore_lion(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankLike = 128,
    *,
    update_proj_gap: RefreshPolicy | int = 200,
    scale: optax.ScalarOrSchedule = 0.25,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any = None,
    axes: Any = None,
    projector: Projector | None = None,
    transport: Transport | None = None,
    side: Side = "short",
    targets: Targets = None,
    codec: Codec | None = None,
    state_dtype: jax.typing.DTypeLike = "float32",
    axis_name: AxisName = None,
    seed: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion with a low-rank momentum.

    .. math::
      W \leftarrow W - \eta\,(\alpha\, \mathrm{Lion}(G P)\, P^\top + \lambda W)

    The sign is taken in the subspace, so an update has ±α in every low-rank coordinate.

    Args:
      learning_rate: A number or a schedule.
      rank: Columns of a basis: an int, a fraction of the projected dimension, or a callable.
      b1: Weight of the momentum in the direction.
      b2: Decay of the momentum.
      update_proj_gap: Steps between refreshes, or a refresh policy.
      scale: α, multiplies the lifted update of projected leaves; a number or a schedule.
      weight_decay: Decoupled, in the full space, not scaled by α.
      mask: Which leaves decay: a tree of booleans, or a callable from parameters to one.
      axes: Which axes form the matrix; see `low_rank_projection`, as for all options below.
      projector: How a basis is found; default ``projectors.randomized_svd()``.
      transport: What happens to the moments when a basis moves; default ``transport.align()``.
      side: "short", "long", "input" or "output".
      targets: Which leaves are projected; default: not embeddings, head, norms and biases.
      codec: How a basis is stored.
      state_dtype: Floating dtype of the moments.
      axis_name: Mapped axes over which gradients are still local.
      seed: Seed of randomized projectors; None means 0.

    Returns:
      A gradient transformation.

    Example:
      >>> import galore_jax as gj
      >>> tx = gj.galore_lion(1e-3, rank=0.25)

    References:
      Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024
      (https://arxiv.org/abs/2403.03507).
      Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023.
    """
    return with_decay_and_rate(
        low_rank_projection(
            optax.scale_by_lion(b1=b1, b2=b2),
            rank,
            projector=projector,
            refresh=update_proj_gap,
            transport=transport,
            scale=scale,
            side=side,
            axes=axes,
            targets=targets,
            codec=codec,
            state_dtype=state_dtype,
            axis_name=axis_name,
            seed=seed,
        ),
        weight_decay,
        mask,
        learning_rate,
    )
