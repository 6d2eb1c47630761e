"""What all aliases share: decoupled weight decay and the learning rate behind a direction."""

from __future__ import annotations

from typing import Any

import jax
import optax

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
    "axis_name",
    "seed",
)
"""Arguments of every alias that are not numbers to be scheduled: for `inject_hyperparams`."""


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
