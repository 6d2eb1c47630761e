"""Who takes the mean of what, where every device has gradients of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax import mapped
from galore_jax.layerwise.clipping import square_sum
from galore_jax.transforms.lenses import find_lenses
from galore_jax.views import ProjectedGradient
from galore_jax.views.leaves import flatten_leaves, leaf_paths, rebox


class Devices(NamedTuple):
    """The mapped axes over which gradients are local.

    Args:
      axes: Their names, all that some lens has for its `axis_name`; none on a single device.
      reduced: Paths of the leaves that such a lens reduces, projected or not.
    """

    axes: tuple[str, ...]
    reduced: frozenset[str]

    def mean(self, x: jax.Array) -> jax.Array:
        """The mean over devices; not finite if it is not finite on one of them."""
        return mapped.mean(x, self.axes or None)

    def reported(self, results: Any) -> Any:
        """Floating results averaged. Of counts the mean might be meant, or the sum: they stay."""
        return jax.tree.map(lambda x: self.mean(x) if _is_floating(x) else x, results)

    def square_sum(self, gradients: Any) -> jax.Array:
        """The square of the norm of their mean, which takes them to all devices at full size."""
        leaves, _ = flatten_leaves(gradients)
        values = [leaf.value if isinstance(leaf, ProjectedGradient) else leaf for leaf in leaves]
        return square_sum(jax.tree.map(self.mean, values))

    def left_over(self, gradients: Any) -> Any:
        """Those that no lens will reduce, averaged; of the others, what this device has."""
        if not self.axes:
            return gradients
        leaves, _ = flatten_leaves(gradients)
        means = [
            leaf if path in self.reduced else self.mean(leaf)
            for path, leaf in zip(leaf_paths(gradients), leaves, strict=True)
        ]
        return rebox(gradients, means)

    def local(self, pullback: Callable[..., Any]) -> Callable[..., Any]:
        """A pullback whose gradients stay local, those that no lens will reduce included."""

        def pulled(fn: Any, params: Any, *args: Any, **options: Any) -> Any:
            leaves, _ = flatten_leaves(params)
            own = [
                leaf if path in self.reduced else self.varying(leaf)
                for path, leaf in zip(leaf_paths(params), leaves, strict=True)
            ]
            return pullback(fn, rebox(params, own), *args, **options)

        return pulled if self.axes else pullback

    def varying(self, tree: Any) -> Any:
        """Arrays as something that JAX does not take for equal on all devices."""
        return jax.tree.map(lambda x: mapped.varying(x, self.axes), tree)


def devices_of(opt_state: Any) -> Devices:
    """The devices that the lenses of an optimizer state know of."""
    lenses = [lens for lens in find_lenses(opt_state) if lens.config.axis_name]
    axes: frozenset[str] = frozenset().union(*(_names(lens.config.axis_name) for lens in lenses))
    reduced = frozenset(
        path for lens in lenses for path in leaf_paths(lens.refresh_state.refreshes)
    )
    return Devices(tuple(sorted(axes)), reduced)


def _names(axis_name: mapped.AxisName) -> tuple[str, ...]:
    return (axis_name,) if isinstance(axis_name, str) else axis_name or ()


def _is_floating(x: jax.Array) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)
