"""Adafactor through the lens: projected leaves are factored by us, all others by optax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax.checks import is_quiet
from galore_jax.leaves import Leaves, has_masks
from galore_jax.transforms.factored_rms import scale_by_factored_rms
from galore_jax.transforms.low_rank import low_rank_projection
from galore_jax.views import ProjectedGradient, leaf_plan
from galore_jax.views.axes import axes_rule
from galore_jax.views.matrix_view import Side
from galore_jax.views.notice import check_projection
from galore_jax.views.plan import RankLike, Rules, rank_rule
from galore_jax.views.targets import Targets, targets_rule


def no_leaf(path: str, leaf: Any) -> bool:
    """Targets of a lens that only sets the state dtype."""
    del path, leaf
    return False


def low_rank_adafactor(
    rank: RankLike,
    decay_rate: float,
    clipping_threshold: float | None,
    momentum: float | None,
    epsilon: float,
    *,
    axes: Any,
    side: Side,
    targets: Targets,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adafactor's direction: two lenses, of which one projects and one only sets the state dtype.

    Args: those of `galore_jax.galore_adafactor` and `low_rank_projection`.
    """
    ema = optax.identity() if momentum is None else optax.ema(momentum, debias=False)
    full = optax.scale_by_factored_rms(decay_rate=decay_rate, epsilon=epsilon)
    # optax asks for parameters, of which it reads the shapes: those of the updates.
    without_params = optax.GradientTransformation(
        full.init, lambda updates, state, params=None: full.update(updates, state, updates)
    )
    clip = (
        optax.identity()
        if clipping_threshold is None
        else optax.clip_by_block_rms(clipping_threshold)
    )
    factored = scale_by_factored_rms(decay_rate, epsilon, clipping_threshold)
    lenses = {
        True: low_rank_projection(
            optax.chain(factored, ema), rank, axes=axes, side=side, targets=targets, **options
        ),
        False: low_rank_projection(
            optax.chain(without_params, clip, ema), rank, side=side, targets=no_leaf, **options
        ),
    }
    rules = Rules(rank_rule(rank), side, axes_rule(axes), targets_rule(targets))
    both = optax.partition(lenses, _is_projected(rules))
    said: set[str] = set()

    def init_fn(params: optax.Params) -> Any:
        if not is_quiet():  # each lens sees a part, which tells it nothing
            check_projection(leaf_plan(rules, params), rules, part=has_masks(params), said=said)
        return both.init(params)

    return optax.GradientTransformationExtraArgs(init_fn, both.update)


def _is_projected(rules: Rules) -> Callable[[Any], Any]:
    """Labels for `optax.partition`: True for the leaves that `rules` project."""

    def labels(tree: Any) -> Any:
        leaves = Leaves.of(tree)
        # A gradient that is already projected has no shape to plan with; no rule looks at the axes
        # of an empty leaf.
        empty = jax.ShapeDtypeStruct((0,), jnp.float32)
        done = [isinstance(leaf, ProjectedGradient) for leaf in leaves.values]
        shapes = [empty if d else leaf for d, leaf in zip(done, leaves.values, strict=True)]
        plans = leaf_plan(rules, leaves.tree(shapes))
        return leaves.tree([d or plan.is_projected for d, plan in zip(done, plans, strict=True)])

    return labels
