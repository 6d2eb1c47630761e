"""GaLore with AdamW in 8 bits, and Q-GaLore."""

from __future__ import annotations

from typing import Any

import jax
import optax

from galore_jax.alias.base import with_decay_and_rate
from galore_jax.codecs import Codec, cast, int4
from galore_jax.mapped import AxisName
from galore_jax.projectors import Projector
from galore_jax.refresh import RefreshPolicy, adaptive
from galore_jax.transforms import low_rank_projection, scale_by_adam8bit
from galore_jax.transport import Transport
from galore_jax.views.matrix_view import Side
from galore_jax.views.plan import RankLike
from galore_jax.views.targets import Targets


def galore_adamw8bit(
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
    r"""`galore_adamw` with moments of one byte each and bf16 bases (8-bit GaLore).

    .. math::
      W \leftarrow W - \eta\,(\alpha\, \mathrm{Adam}_8(G P)\, P^\top + \lambda W)

    Moments with fewer than 4096 entries stay in fp32. The moments of leaves that are not projected
    (embeddings, head) take one byte each as well.

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
      codec: How a basis is stored; default ``codecs.cast("bfloat16")``.
      state_dtype: Floating dtype of the moments while they are updated.
      axis_name: Mapped axes over which gradients are still local.
      seed: Seed of randomized projectors; None means 0.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> tx = gj.galore_adamw8bit(1e-2, rank=64)
      >>> state = tx.init({"w": jnp.ones((256, 512))})[0]
      >>> state.inner_state.mu["w"].codes.dtype, state.projectors["w"].dtype
      (dtype('uint8'), dtype(bfloat16))

    References:
      Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024
      (https://arxiv.org/abs/2403.03507).
      Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021
      (https://arxiv.org/abs/2110.02861).
    """
    return with_decay_and_rate(
        low_rank_projection(
            scale_by_adam8bit(b1=b1, b2=b2, eps=eps),
            rank,
            projector=projector,
            refresh=update_proj_gap,
            transport=transport,
            scale=scale,
            side=side,
            axes=axes,
            targets=targets,
            codec=cast("bfloat16") if codec is None else codec,
            state_dtype=state_dtype,
            axis_name=axis_name,
            seed=seed,
        ),
        weight_decay,
        mask,
        learning_rate,
    )


def q_galore_adamw8bit(
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
    r"""Q-GaLore: INT4 bases, 8-bit moments, and refreshes only where the subspace still moves.

    .. math::
      W \leftarrow W - \eta\,(\alpha\, \mathrm{Adam}_8(G \hat P)\, \hat P^\top + \lambda W)

    with the decoded basis on both sides. The paper stores the weights in INT8 as well: make them so
    with `galore_jax.quant.quantize_params`, and write them with `galore_jax.apply_updates`.

    Args:
      learning_rate: A number or a schedule.
      rank: Columns of a basis: an int, a fraction of the projected dimension, or a callable.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment, after bias correction.
      update_proj_gap: First gap of ``refresh.adaptive``, or a refresh policy.
      scale: α, multiplies the lifted update of projected leaves; a number or a schedule.
      weight_decay: Decoupled, in the full space, not scaled by α.
      mask: Which leaves decay: a tree of booleans, or a callable from parameters to one.
      axes: Which axes form the matrix; see `low_rank_projection`, as for all options below.
      projector: How a basis is found; default ``projectors.randomized_svd()``.
      transport: What happens to the moments when a basis moves; default ``transport.align()``.
      side: "short", "long", "input" or "output".
      targets: Which leaves are projected; default: not embeddings, head, norms and biases.
      codec: How a basis is stored; default ``codecs.int4()``.
      state_dtype: Floating dtype of the moments while they are updated.
      axis_name: Mapped axes over which gradients are still local.
      seed: Seed of randomized projectors; None means 0.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax, jax.numpy as jnp, galore_jax as gj
      >>> params = gj.quant.quantize_params({"w": jnp.ones((256, 512))})
      >>> tx = gj.q_galore_adamw8bit(1e-2, rank=64)
      >>> state = tx.init(params)
      >>> loss = lambda params, x: jnp.mean(gj.matmul(x, params["w"]) ** 2)
      >>> value, grads = gj.quant.value_and_grad(loss)(params, jnp.ones((8, 256)))
      >>> updates, state = tx.update(grads, state, params)
      >>> params = gj.apply_updates(params, updates, key=jax.random.key(0))
      >>> params["w"]
      QuantizedArray(shape=(256, 512), bits=8, block=256, dtype=float32)

    References:
      Zhang et al., "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank
      Gradients", 2024 (https://arxiv.org/abs/2407.08296).
    """
    policy = adaptive(update_proj_gap) if isinstance(update_proj_gap, int) else update_proj_gap
    return with_decay_and_rate(
        low_rank_projection(
            scale_by_adam8bit(b1=b1, b2=b2, eps=eps),
            rank,
            projector=projector,
            refresh=policy,
            transport=transport,
            scale=scale,
            side=side,
            axes=axes,
            targets=targets,
            codec=int4() if codec is None else codec,
            state_dtype=state_dtype,
            axis_name=axis_name,
            seed=seed,
        ),
        weight_decay,
        mask,
        learning_rate,
    )
