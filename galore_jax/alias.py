"""The optimizers people type: lens -> decoupled weight decay -> learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.codecs import Codec
from galore_jax.projectors import Projector
from galore_jax.refresh import RefreshPolicy
from galore_jax.transforms import low_rank_projection, scale_by_factored_rms
from galore_jax.transport import Transport
from galore_jax.views import ProjectedGradient, leaf_plan
from galore_jax.views.axes import axes_rule
from galore_jax.views.leaves import flatten_leaves
from galore_jax.views.matrix_view import Side
from galore_jax.views.plan import RankLike, Rules
from galore_jax.views.targets import Targets

STATIC_ARGS = (
    "rank",
    "update_proj_gap",
    "mask",
    "axes",
    "projector",
    "transport",
    "side",
    "targets",
    "codec",
    "state_dtype",
    "seed",
)
"""Arguments of every alias that are not numbers to be scheduled: for `inject_hyperparams`."""


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
    return _with_decay_and_rate(
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
            seed=seed,
        ),
        weight_decay,
        mask,
        learning_rate,
    )


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
    return _with_decay_and_rate(
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
            seed=seed,
        ),
        weight_decay,
        mask,
        learning_rate,
    )


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
    return _with_decay_and_rate(
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
            seed=seed,
        ),
        weight_decay,
        mask,
        learning_rate,
    )


def galore_sgd(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankLike = 128,
    *,
    update_proj_gap: RefreshPolicy | int = 200,
    scale: optax.ScalarOrSchedule = 0.25,
    momentum: float | None = None,
    nesterov: bool = False,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any = None,
    axes: Any = None,
    projector: Projector | None = None,
    transport: Transport | None = None,
    side: Side = "short",
    targets: Targets = None,
    codec: Codec | None = None,
    state_dtype: jax.typing.DTypeLike = "float32",
    seed: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD, optionally with a low-rank momentum.

    .. math::
      W \leftarrow W - \eta\,(\alpha\, \mathrm{trace}(G P)\, P^\top + \lambda W)

    Args:
      learning_rate: A number or a schedule.
      rank: Columns of a basis: an int, a fraction of the projected dimension, or a callable.
      momentum: Decay of the momentum; None for none.
      nesterov: Whether the momentum looks ahead.
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
      seed: Seed of randomized projectors; None means 0.

    Returns:
      A gradient transformation.

    Example:
      >>> import galore_jax as gj
      >>> tx = gj.galore_sgd(1e-1, rank=8, momentum=0.9)

    References:
      Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024
      (https://arxiv.org/abs/2403.03507).
    """
    return _with_decay_and_rate(
        low_rank_projection(
            optax.identity() if momentum is None else optax.trace(momentum, nesterov),
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
            seed=seed,
        ),
        weight_decay,
        mask,
        learning_rate,
    )


def galore_adafactor(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankLike = 128,
    *,
    update_proj_gap: RefreshPolicy | int = 200,
    scale: optax.ScalarOrSchedule = 0.25,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    momentum: float | None = 0.9,
    epsilon: float = 1e-30,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any = None,
    axes: Any = None,
    projector: Projector | None = None,
    transport: Transport | None = None,
    side: Side = "short",
    targets: Targets = None,
    codec: Codec | None = None,
    state_dtype: jax.typing.DTypeLike = "float32",
    seed: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adafactor in the subspace: factored second moments however small the rank.

    .. math::
      W \leftarrow W - \eta\,(\alpha\, \mathrm{Adafactor}(G P)\, P^\top + \lambda W)

    Without parameter scaling and relative steps, as in the released code. Projected leaves are
    always factored, matrix by matrix; all others go through optax's factored RMS with its own
    threshold of 128.

    Args:
      learning_rate: A number or a schedule.
      rank: Columns of a basis: an int, a fraction of the projected dimension, or a callable.
      decay_rate: Exponent of the second moment's decay schedule.
      clipping_threshold: Largest RMS of an update, per projected matrix and per other leaf; None
        for no clipping.
      momentum: Decay of the first moment, taken of the normalised update; None for none.
      epsilon: Added to squared gradients.
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
      seed: Seed of randomized projectors; None means 0.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> tx = gj.galore_adafactor(1e-2, rank=4)
      >>> state = tx.init({"w": jnp.ones((64, 32))})

    References:
      Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024
      (https://arxiv.org/abs/2403.03507).
      Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018.
    """
    ema = optax.identity() if momentum is None else optax.ema(momentum, debias=False)
    clip = (
        optax.identity()
        if clipping_threshold is None
        else optax.clip_by_block_rms(clipping_threshold)
    )
    full_rms = optax.scale_by_factored_rms(decay_rate=decay_rate, epsilon=epsilon)
    options = {
        "projector": projector,
        "refresh": update_proj_gap,
        "transport": transport,
        "scale": scale,
        "side": side,
        "codec": codec,
        "state_dtype": state_dtype,
        "seed": seed,
    }
    projected = low_rank_projection(
        optax.chain(scale_by_factored_rms(decay_rate, epsilon, clipping_threshold), ema),
        rank,
        axes=axes,
        targets=targets,
        **options,
    )
    full = low_rank_projection(
        optax.chain(_shapes_for(full_rms), clip, ema), rank, targets=_no_leaf, **options
    )
    return _with_decay_and_rate(
        optax.partition(
            {True: projected, False: full},
            _is_projected(Rules(rank, side, axes_rule(axes), targets)),
        ),
        weight_decay,
        mask,
        learning_rate,
    )


def _shapes_for(rms: optax.GradientTransformation) -> optax.GradientTransformation:
    """optax's factored RMS asks for `params` and reads their shapes: those of the updates."""

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return rms.update(updates, state, updates)

    return optax.GradientTransformation(rms.init, update_fn)


def _no_leaf(path: str, leaf: Any) -> bool:
    """Targets of a lens that only changes the dtype of the state."""
    del path, leaf
    return False


def _is_projected(rules: Rules) -> Callable[[Any], Any]:
    """Labels for `optax.partition`: which leaves `rules` project."""

    def label(tree: Any) -> Any:
        leaves, treedef = flatten_leaves(tree)
        # A gradient that is already projected has no shape to plan with, and needs none.
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        done = [isinstance(leaf, ProjectedGradient) for leaf in leaves]
        plans = leaf_plan(
            rules,
            treedef.unflatten(scalar if d else leaf for d, leaf in zip(done, leaves, strict=True)),
        )
        return treedef.unflatten(
            d or plan.is_projected for d, plan in zip(done, plans, strict=True)
        )

    return label


def _with_decay_and_rate(
    direction: optax.GradientTransformation,
    weight_decay: jax.typing.ArrayLike,
    mask: Any,
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    # Without decay nothing needs `params`; the state has the same structure either way.
    without_decay = isinstance(weight_decay, int | float) and weight_decay == 0 and mask is None
    decay = optax.identity() if without_decay else optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(direction, decay, optax.scale_by_learning_rate(learning_rate))
