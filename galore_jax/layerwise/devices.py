"""Means over mapped axes, where every device has gradients of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_jax import collectives
from galore_jax.layerwise.clipping import square_sum, values_of
from galore_jax.layerwise.slices import Layer
from galore_jax.leaves import Leaves
from galore_jax.transforms.lenses import projection_leaves


class Devices(NamedTuple):
    """The mapped axes over which gradients are local.

    Args:
      axes: Their names, all that some lens has for its `axis_name`; none on a single device.
      reduced: Numbers of the leaves that such a lens reduces, projected or not.
    """

    axes: tuple[str, ...]
    reduced: frozenset[int]

    def mean(self, x: jax.Array) -> jax.Array:
        """The mean over devices; not finite if it is not finite on one of them."""
        return collectives.mean(x, self.axes or None)

    def reported(self, results: Any) -> Any:
        """Floating results averaged. Of counts the mean might be meant, or the sum: they stay."""
        return jax.tree.map(
            lambda x: self.mean(x) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x,
            results,
        )

    def square_sum(self, gradients: Any) -> jax.Array:
        """The square of the norm of their mean, which takes them to all devices at full size."""
        return square_sum(list(map(self.mean, values_of(gradients))))

    def left_over(self, gradients: Any) -> Any:
        """Gradients, averaged over devices if no lens will reduce them; the others stay local."""
        if not self.axes:
            return gradients
        leaves = Leaves.of(gradients)
        pairs = enumerate(leaves.values)
        return leaves.boxed([x if n in self.reduced else self.mean(x) for n, x in pairs])

    def local(self, pullback: Callable[..., Any]) -> Callable[..., Any]:
        """A pullback whose gradients stay local: JAX does not take parameters for equal."""

        def pulled(fn: Any, params: Any, *args: Any, **options: Any) -> Any:
            own = jax.tree.map(lambda x: collectives.varying(x, self.axes), params)
            return pullback(fn, own, *args, **options)

        return pulled if self.axes else pullback


def devices_of(whole: Layer) -> Devices:
    """The devices that the lenses of an optimizer state know of."""
    mapped_over = [
        (collectives.names(lens.config.axis_name), lens.owners)
        for lens in projection_leaves(whole.opt_state, whole.params)
    ]
    return Devices(
        tuple(sorted({name for names, _ in mapped_over for name in names})),
        frozenset(number for names, numbers in mapped_over if names for number in numbers),
    )
