"""GaLore around any gradient transformation."""

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


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankLike = 128,
    update_proj_gap: RefreshPolicy | int = 200,
    scale: optax.ScalarOrSchedule = 1.0,
    base_optimizer: optax.GradientTransformation | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any = None,
    weight_dimension_numbers: Any = None,
    *,
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
    r"""GaLore around any gradient transformation; call-compatible with `optax.contrib.galore`.

    .. math::
      W \leftarrow W - \eta\,(\alpha\, \mathrm{base}(G P)\, P^\top + \lambda W)

    The numbers of `optax.contrib.galore` come out with ``side="long", projector=projectors.svd(),
    transport=transport.keep(), targets=all_matrices``.

    Args:
      learning_rate: A number or a schedule.
      rank: Columns of a basis: an int, a fraction of the projected dimension, or a callable.
      update_proj_gap: Steps between refreshes, or a refresh policy.
      scale: α, multiplies the lifted update of projected leaves; a number or a schedule.
      base_optimizer: Runs in the subspace, without parameters; default ``optax.scale_by_adam()``.
      weight_decay: Decoupled, in the full space, not scaled by α.
      mask: Which leaves decay: a tree of booleans, or a callable from parameters to one.
      weight_dimension_numbers: optax's name for `axes`; a lone one applies to every leaf with
        two or more axes.
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

    Raises:
      ValueError: Both `axes` and `weight_dimension_numbers` are given.

    Example:
      >>> import jax.numpy as jnp, optax, galore_jax as gj
      >>> params = {"w": jnp.ones((64, 32))}
      >>> tx = gj.galore(1e-2, rank=4, base_optimizer=optax.scale_by_lion())
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> updates["w"].shape
      (64, 32)

    References:
      Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024
      (https://arxiv.org/abs/2403.03507).
    """
    if axes is not None and weight_dimension_numbers is not None:
        raise ValueError(
            "give either `axes` or `weight_dimension_numbers` (optax's name for it), not both."
        )
    axes = weight_dimension_numbers if axes is None else axes
    base = optax.scale_by_adam() if base_optimizer is None else base_optimizer
    return with_decay_and_rate(
        low_rank_projection(
            base,
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
