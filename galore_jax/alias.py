"""The optimizers that people type: lens -> decoupled weight decay -> learning rate."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import optax

from galore_jax.codecs import Codec, cast, int4
from galore_jax.collectives import AxisName
from galore_jax.projectors import Projector
from galore_jax.recovery import Recovery
from galore_jax.refresh import RefreshPolicy, adaptive
from galore_jax.signatures import spelled_out
from galore_jax.transforms import low_rank_projection, scale_by_adam8bit
from galore_jax.transforms.adafactor import low_rank_adafactor
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
    recovery: Recovery | None = None,
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

    With ``side="long", projector=projectors.svd(), transport=transport.keep(),
    targets=all_matrices`` the numbers are those of `optax.contrib.galore`.

    Args:
      learning_rate: η, a number or a schedule.
      rank: Columns of a basis: an int, a fraction of the projected dimension, or a callable.
      update_proj_gap: Steps between refreshes, or a refresh policy.
      scale: α, multiplies the lifted update of projected leaves; a number or a schedule.
      base_optimizer: Runs in the subspace, without parameters; default ``optax.scale_by_adam()``.
      weight_decay: λ, decoupled, in the full space, not scaled by α.
      mask: Leaves that decay: a tree of booleans, or a callable from parameters to one.
      weight_dimension_numbers: optax's name for `axes`.
      axes: Axes that form the matrix; see `low_rank_projection`, as for all options below.
      projector: Method that finds a basis; default ``projectors.randomized_svd()``.
      transport: Change of the moments when a basis moves; default ``transport.align()``.
      recovery: Use of what a basis leaves out of a gradient; default ``recovery.drop()``.
      side: Matrix axis that is projected: "short", "long", "input" or "output".
      targets: Leaves that are projected; default: not embeddings, head, norms and biases.
      codec: Storage format of a basis; default ``codecs.identity()``.
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
        raise ValueError("give `axes` or `weight_dimension_numbers`, its name in optax; not both.")
    lens = low_rank_projection(
        optax.scale_by_adam() if base_optimizer is None else base_optimizer,
        rank,
        projector=projector,
        refresh=update_proj_gap,
        transport=transport,
        recovery=recovery,
        scale=scale,
        side=side,
        axes=weight_dimension_numbers if axes is None else axes,
        targets=targets,
        codec=codec,
        state_dtype=state_dtype,
        axis_name=axis_name,
        seed=seed,
    )
    return with_decay_and_rate(lens, weight_decay, mask, learning_rate)


def with_decay_and_rate(
    direction: optax.GradientTransformation,
    weight_decay: jax.typing.ArrayLike,
    mask: Any,
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """direction -> weight decay in the full space -> learning rate."""
    # Without decay nothing needs `params`; the state has the same structure either way.
    without_decay = isinstance(weight_decay, int | float) and weight_decay == 0 and mask is None
    decay = optax.identity() if without_decay else optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(direction, decay, optax.scale_by_learning_rate(learning_rate))


_NOT_SHARED = ("base_optimizer", "weight_dimension_numbers")
_NUMBERS = ("learning_rate", "scale", "weight_decay")
STATIC_ARGS = tuple(
    name for name in inspect.signature(galore).parameters if name not in _NUMBERS + _NOT_SHARED
)
"""Arguments of every alias that are not numbers to be scheduled: for `inject_hyperparams`."""

_like_galore = spelled_out(galore, *_NOT_SHARED, scale=0.25)


@_like_galore
def galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankLike = 128,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nesterov: bool = False,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with low-rank moments, and the paper's α.

    .. math::
      W \leftarrow W - \eta\,(\alpha\, \mathrm{Adam}(G P)\, P^\top + \lambda W)

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment, after bias correction.
      eps_root: Added to the second moment under the root, after bias correction.
      mu_dtype: Dtype of the first moment (its name, under `optax.inject_hyperparams`); None for
        `state_dtype`.
      nesterov: Whether the first moment looks one step ahead.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> params = {"w": jnp.ones((64, 32)), "b": jnp.ones((32,))}
      >>> tx = gj.galore_adamw(1e-2, rank=4, weight_decay=0.1)
      >>> tx.init(params)[0].inner_state.nu["w"].shape
      (64, 4)
    """
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    return galore(learning_rate, rank, base_optimizer=adam, **options)


@spelled_out(galore_adamw, "mu_dtype")
def galore_adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankLike = 128,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    nesterov: bool = False,
    codec: Codec | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""`galore_adamw` with moments of one byte each and bf16 bases (8-bit GaLore).

    .. math::
      W \leftarrow W - \eta\,(\alpha\, \mathrm{Adam}_8(G P)\, P^\top + \lambda W)

    Moments with fewer than 4096 entries stay in fp32. The moments of leaves that are not projected
    (embeddings, head) take one byte each as well.

    Args:
      codec: Storage format of a basis; default ``codecs.cast("bfloat16")``.
      state_dtype: Floating dtype of the moments while they are updated.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> tx = gj.galore_adamw8bit(1e-2, rank=64)
      >>> state = tx.init({"w": jnp.ones((256, 512))})[0]
      >>> state.inner_state.mu["w"].codes.dtype, state.projectors["w"].dtype
      (dtype('uint8'), dtype(bfloat16))

    References:
      Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021
      (https://arxiv.org/abs/2110.02861).
    """
    adam = scale_by_adam8bit(b1, b2, eps, eps_root, nesterov=nesterov)
    codec = cast("bfloat16") if codec is None else codec
    return galore(learning_rate, rank, base_optimizer=adam, codec=codec, **options)


@spelled_out(galore_adamw8bit)
def q_galore_adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankLike = 128,
    *,
    update_proj_gap: RefreshPolicy | int = 200,
    codec: Codec | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Q-GaLore: INT4 bases, 8-bit moments, and refreshes only where the subspace still moves.

    .. math::
      W \leftarrow W - \eta\,(\alpha\, \mathrm{Adam}_8(G \hat P)\, \hat P^\top + \lambda W)

    where :math:`\hat P` is the decoded basis. The paper stores the weights in INT8 as well: do so
    with `galore_jax.quant.quantize_params`, and update them with `galore_jax.apply_updates`.

    Args:
      update_proj_gap: First gap of ``refresh.adaptive``, or a refresh policy.
      codec: Storage format of a basis; default ``codecs.int4()``.

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
    gap, codec = update_proj_gap, int4() if codec is None else codec
    gap = gap if isinstance(gap, RefreshPolicy) else adaptive(gap)
    return galore_adamw8bit(learning_rate, rank, update_proj_gap=gap, codec=codec, **options)


@_like_galore
def galore_lion(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankLike = 128,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion with a low-rank momentum.

    .. math::
      W \leftarrow W - \eta\,(\alpha\, \mathrm{Lion}(G P)\, P^\top + \lambda W)

    The sign is taken in the subspace, so an update has ±α in every low-rank coordinate.

    Args:
      b1: Weight of the momentum in the direction.
      b2: Decay of the momentum.

    Example:
      >>> import galore_jax as gj
      >>> tx = gj.galore_lion(1e-3, rank=0.25)

    References:
      Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023.
    """
    return galore(learning_rate, rank, base_optimizer=optax.scale_by_lion(b1, b2), **options)


@_like_galore
def galore_sgd(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankLike = 128,
    *,
    momentum: float | None = None,
    nesterov: bool = False,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD, optionally with a low-rank momentum.

    .. math::
      W \leftarrow W - \eta\,(\alpha\, \mathrm{trace}(G P)\, P^\top + \lambda W)

    Args:
      momentum: Decay of the momentum; None for none.
      nesterov: Whether the momentum looks one step ahead.

    Example:
      >>> import galore_jax as gj
      >>> tx = gj.galore_sgd(1e-1, rank=8, momentum=0.9)
    """
    trace = optax.identity() if momentum is None else optax.trace(momentum, nesterov)
    return galore(learning_rate, rank, base_optimizer=trace, **options)


@_like_galore
def galore_adafactor(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankLike = 128,
    *,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    momentum: float | None = 0.9,
    epsilon: float = 1e-30,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Adafactor in the subspace: factored second moments however small the rank.

    .. math::
      W \leftarrow W - \eta\,(\alpha\, \mathrm{Adafactor}(G P)\, P^\top + \lambda W)

    Without parameter scaling and relative steps, as in the released code. Projected leaves are
    always factored, matrix by matrix; all others go through optax's factored RMS with its own
    threshold of 128.

    Args:
      decay_rate: Exponent of the second moment's decay schedule.
      clipping_threshold: Largest RMS of an update, per projected matrix or leaf; None for none.
      momentum: Decay of the first moment, taken of the normalised update; None for none.
      epsilon: Added to squared gradients.

    Example:
      >>> import galore_jax as gj
      >>> tx = gj.galore_adafactor(1e-2, rank=4)

    References:
      Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018.
    """
    weight_decay, mask, gap = map(options.pop, ("weight_decay", "mask", "update_proj_gap"))
    direction = low_rank_adafactor(
        rank, decay_rate, clipping_threshold, momentum, epsilon, refresh=gap, **options
    )
    return with_decay_and_rate(direction, weight_decay, mask, learning_rate)
