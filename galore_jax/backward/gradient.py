"""Gradients that arrive projected: `jax.value_and_grad` for low-rank optimizers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax import mapped
from galore_jax.backward.probes import Probes, gradient_of, no_probes
from galore_jax.backward.weight import ProjectedWeight
from galore_jax.quant import DifferentiableWeight, QuantizedArray
from galore_jax.transforms import subspace
from galore_jax.transforms.config import LowRankConfig
from galore_jax.transforms.lenses import lens_leaves, with_configs
from galore_jax.transforms.subspace import LeafSubspace
from galore_jax.views.leaves import flatten_leaves, is_one_leaf, leaf_paths, rebox


def projected_value_and_grad(
    loss_fn: Callable[..., Any], tx: optax.GradientTransformation, *, has_aux: bool = False
) -> Callable[..., Any]:
    r"""`jax.value_and_grad` whose gradients of projected leaves are never formed.

    For a product :math:`y = xW` the gradient of a weight is :math:`G = x^\top \partial y`, so its
    projection comes out of two skinny products,

    .. math::
      R = G P = x^\top(\partial y\, P) \quad\text{or}\quad (x P)^\top \partial y,

    and a refresh needs no more than products of G with other skinny matrices. Fewer operations than
    the gradient takes, no array of its size, and between devices only R and sketches travel.

    The loss function gets `ProjectedWeight`s in the places of projected leaves: it multiplies with
    `galore_jax.matmul`, ``x @ w`` or `galore_jax.backward.einsum`, each of them in one product.
    Two products of one weight are fine until its basis is due; then each finds another one, and the
    gradient is NaN (and the basis stays due): decode such a weight once, with ``w.astype(dtype)``.
    Layers of Flax take `galore_jax.backward.dot_general` and `promote_dtype`. Scanned and
    rematerialised layers, INT8 weights, sharded arrays and `jax.shard_map` are fine.

    Every call is one gradient: bases that are due are recomputed in it. To sum up micro-batches,
    put the optimizer into `galore_jax.accumulate`, which has one basis for each window, and call
    this once for each micro-batch. Sums of these gradients themselves (`optax.microbatching`) are
    right on ordinary steps only.

    What stands in front of a lens sees projected gradients: `optax.clip_by_global_norm` clips by
    the norm of R. Wrappers that return or sum up their input (`optax.apply_if_finite`,
    `optax.MultiSteps`) cannot have a lens inside; skip a step with `jax.lax.cond` around
    ``tx.update``.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs) -> scalar``, or ``(scalar, aux)``.
      tx: The optimizer, any chain with lenses in it. Its projectors must do with products
        (`randomized_svd`, `subspace_iteration`, `random_orthonormal`).
      has_aux: Whether `loss_fn` returns a pair.

    Returns:
      ``fn(params, opt_state, *args, **kwargs) -> (value, grads)``, with a `ProjectedGradient` for
      every projected leaf and arrays for the others. ``tx.update`` takes them, with ``params``.

    Raises:
      ValueError: A projector that needs the gradient itself, or a product that does not have the
        matrix axes of a leaf as its sides.

    Example:
      >>> import jax, jax.numpy as jnp, galore_jax as gj
      >>> params = {"up": jnp.ones((16, 64)), "norm": jnp.ones(16)}
      >>> tx = gj.galore_adamw(1e-2, rank=4)
      >>> state = tx.init(params)
      >>> loss = lambda p, x: jnp.mean(gj.matmul(x * p["norm"], p["up"]) ** 2)
      >>> value, grads = gj.projected_value_and_grad(loss, tx)(params, state, jnp.ones((8, 16)))
      >>> grads["up"].value.shape, grads["norm"].shape
      ((64, 4), (16,))
      >>> updates, state = tx.update(grads, state, params)
    """

    def value_and_grad_fn(params: Any, opt_state: Any, *args: Any, **kwargs: Any) -> Any:
        leaves = _Leaves(params, with_configs(opt_state, tx, params))

        def loss_of_probes(probes: list[Any]) -> Any:
            return loss_fn(leaves.attach(probes), *args, **kwargs)

        value, cotangents = jax.value_and_grad(loss_of_probes, has_aux=has_aux)(leaves.probes())
        return value, leaves.collect(cotangents)

    return value_and_grad_fn


def pullback(
    fn: Callable[..., Any], params: Any, opt_state: Any, *inputs: Any, layer: Any = 0
) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """The output of `fn`, and the function that takes its cotangent back.

    Args:
      fn: ``fn(params, *inputs)``, a function of parameters as `projected_value_and_grad` wants it.
      params: Its parameters.
      opt_state: State of the optimizer for them.
      *inputs: Floating arrays that `fn` is differentiated by as well.
      layer: For slices of one layer out of stacked leaves, the number of the layer.

    Returns:
      The output, and a function from its cotangent to ``(grads, *cotangents of inputs)``, with a
      `ProjectedGradient` for every projected leaf.

    Example:
      >>> import jax.numpy as jnp, galore_jax as gj
      >>> params = {"w": jnp.ones((16, 8))}
      >>> state = gj.galore_sgd(1e-2, rank=2).init(params)
      >>> layer = lambda p, x: x @ p["w"]
      >>> y, pull = gj.backward.pullback(layer, params, state, jnp.ones((4, 16)))
      >>> grads, dx = pull(jnp.ones_like(y))
      >>> grads["w"].value.shape, dx.shape
      ((16, 2), (4, 16))
    """
    leaves = _Leaves(params, opt_state, layer)
    output, pull = jax.vjp(
        lambda probes, *inputs: fn(leaves.attach(probes), *inputs), leaves.probes(), *inputs
    )

    def collected(cotangent: Any) -> tuple[Any, ...]:
        probes, *others = pull(cotangent)
        return leaves.collect(probes), *others

    return output, collected


class _Leaves:
    """The leaves of a parameter tree, and what each is differentiated by."""

    def __init__(self, params: Any, opt_state: Any, layer: Any = 0):
        self._params = params
        self._leaves, _ = flatten_leaves(params)
        self._paths = leaf_paths(params)
        self._axis_names: dict[str, mapped.AxisName] = {}
        self._subspaces: dict[str, tuple[LowRankConfig, LeafSubspace]] = {}
        for config, subspaces, _ in lens_leaves(opt_state, params, layer):
            for leaf in subspaces:
                self._axis_names[leaf.plan.path] = config.axis_name
                if leaf.plan.is_projected:
                    _check_projector(config, leaf.plan.path)
                    self._subspaces[leaf.plan.path] = config, leaf

    def probes(self) -> list[Any]:
        """Per leaf what is differentiated by: the leaf itself, if it is an ordinary array."""
        return [
            self._probe(path, leaf) for path, leaf in zip(self._paths, self._leaves, strict=True)
        ]

    def attach(self, probes: list[Any]) -> Any:
        """The parameters as the model gets them."""
        return rebox(self._params, list(map(self._attached, self._paths, self._leaves, probes)))

    def collect(self, cotangents: list[Any]) -> Any:
        """The gradients, from the cotangents of the probes."""
        gradients = [gradient_of(c) if isinstance(c, Probes) else c for c in cotangents]
        return rebox(self._params, gradients)

    def _probe(self, path: str, leaf: Any) -> Any:
        # Gradients stay local to each device: it is the lens that takes their mean, and of R.
        local = functools.partial(mapped.varying, axis_name=self._axis_names.get(path))
        if path not in self._subspaces:
            quantized = isinstance(leaf, QuantizedArray)
            return local(jnp.zeros(leaf.shape, leaf.dtype) if quantized else leaf)
        config, space = self._subspaces[path]
        probes = no_probes(space, config, subspace.decode(config, space.plan, space.stored))
        return dataclasses.replace(probes, value=local(probes.value))

    def _attached(self, path: str, leaf: Any, probe: Any) -> Any:
        if path not in self._subspaces:
            return DifferentiableWeight(leaf, probe) if is_one_leaf(leaf) else probe
        config, space = self._subspaces[path]
        return ProjectedWeight(
            weight=jax.lax.stop_gradient(leaf),
            probes=probe,
            stored=space.stored,
            due=space.due,
            refreshes=space.refreshes,
            key=space.key,
            plan=space.plan,
            config=config,
        )


def _check_projector(config: LowRankConfig, path: str) -> None:
    if config.projector.forms_gradient:
        raise ValueError(
            f"leaf {path!r}: {config.projector} needs the gradient itself, which a projected "
            "backward pass does not form. Use randomized_svd, subspace_iteration or "
            "random_orthonormal, or jax.value_and_grad."
        )
