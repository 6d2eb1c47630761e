"""GaLore with Adafactor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.alias.base import with_decay_and_rate
from galore_jax.codecs import Codec
from galore_jax.mapped import AxisName
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
    axis_name: AxisName = None,
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
      axis_name: Mapped axes over which gradients are still local.
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
        "axis_name": axis_name,
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
    return with_decay_and_rate(
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
