"""GaLore with AdamW."""

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


def galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankLike = 128,
    *,
    update_proj_gap: RefreshPolicy | int = 200,
    scale: optax.ScalarOrSchedule = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
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
    r"""AdamW with low-rank moments, and the paper's α.

    .. math::
      W \leftarrow W - \eta\,(\alpha\, \mathrm{Adam}(G P)\, P^\top + \lambda W)

    Args:
      learning_rate: A number or a schedule.
      rank: Columns of a basis: an int, a fraction of the projected dimension, or a callable.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment, after bias correction.
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
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> params = {"w": jnp.ones((64, 32)), "b": jnp.ones((32,))}
      >>> tx = gj.galore_adamw(1e-2, rank=4, weight_decay=0.1)
      >>> tx.init(params)[0].inner_state.nu["w"].shape
      (64, 4)

    References:
      Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024
      (https://arxiv.org/abs/2403.03507).
    """
    return with_decay_and_rate(
        low_rank_projection(
            optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
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
