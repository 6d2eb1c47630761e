"""Gradients that arrive projected: `jax.value_and_grad` for low-rank optimizers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_jax import collectives
from galore_jax.backward.slots import CotangentSlots, gradient_of, zero_slots
from galore_jax.backward.weight import ProjectedWeight
from galore_jax.leaves import Leaves, is_one_leaf
from galore_jax.quant import DifferentiableWeight, QuantizedArray
from galore_jax.quant.weight import Label
from galore_jax.transforms import AccumulateState, LowRankState, subspace
from galore_jax.transforms.config import LowRankConfig
from galore_jax.transforms.lenses import projection_leaves, with_configs
from galore_jax.transforms.state import low_rank_states
from galore_jax.transforms.subspace import LeafSubspace


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
        opt_state = with_configs(opt_state, tx, params)
        leaves = _Leaves(params, opt_state, low_rank_states(opt_state))
        leaves.check_projectors()

        def loss_of_slots(slots: list[Any]) -> Any:
            return loss_fn(leaves.attach(slots), *args, **kwargs)

        value, cotangents = jax.value_and_grad(loss_of_slots, has_aux=has_aux)(leaves.slots())
        return value, leaves.collect(cotangents)

    return value_and_grad_fn


def pullback(
    fn: Callable[..., Any], params: Any, opt_state: Any, *inputs: Any, layer: Any = 0
) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """The output of `fn`, and the function that takes its cotangent back.

    Gradients of projected leaves come projected where a lens is the first to see them. They are
    formed, and the lens projects them, if its projector needs the gradient itself (`svd`,
    `gram_eigh`), or if anything stands in front of the lens or around it that would take the arrays
    of a projected gradient for gradients (`optax.clip`, `optax.MultiSteps`; not `accumulate`).

    Args:
      fn: ``fn(params, *inputs)``, a function of parameters as `projected_value_and_grad` wants it.
      params: Its parameters.
      opt_state: State of the optimizer for them.
      *inputs: Floating arrays that `fn` is differentiated by as well.
      layer: For slices of one layer out of stacked leaves, the number of the layer.

    Returns:
      The output, and a function from its cotangent to ``(grads, *cotangents of inputs)``, with a
      `ProjectedGradient` for every leaf that is projected in the backward pass.

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
    lenses = [lens for lens in _first_lenses(opt_state) if not lens.config.projector.forms_gradient]
    leaves = _Leaves(params, opt_state, lenses, layer)
    output, pull = jax.vjp(
        lambda slots, *inputs: fn(leaves.attach(slots), *inputs), leaves.slots(), *inputs
    )

    def collected(cotangent: Any) -> tuple[Any, ...]:
        slots, *others = pull(cotangent)
        return leaves.collect(slots), *others

    return output, collected


def _first_lenses(node: Any) -> list[LowRankState]:
    """The lenses that get gradients as they are, or times a factor that all leaves share.

    Other transformations in front of a lens, or around it, would take the arrays of a projected
    gradient for gradients.
    """
    if isinstance(node, LowRankState):
        return [node]
    if isinstance(node, AccumulateState):  # projects before it adds up
        return low_rank_states(node)
    if isinstance(node, optax.transforms.PartitionState):
        return [lens for inner in node.inner_states.values() for lens in _first_lenses(inner)]
    if isinstance(node, _TRANSPARENT):
        return _first_lenses(node.inner_state)
    if type(node) is tuple:  # a chain: what comes behind a lens does not get the gradient
        behind = (child for child in node if not getattr(child, "scales_gradients", False))
        return _first_lenses(next(behind, None))
    return []


_TRANSPARENT = (
    optax.MaskedState,
    optax.InjectHyperparamsState,
    optax.InjectStatefulHyperparamsState,
)


class _Leaves:
    """The leaves of a parameter tree, and the arrays that each is differentiated by.

    Args:
      params: The tree.
      opt_state: State of the optimizer.
      lenses: Those whose leaves are differentiated by slots.
      layer: See `pullback`.
    """

    def __init__(self, params: Any, opt_state: Any, lenses: list[LowRankState], layer: Any = 0):
        self._leaves = Leaves.of(params)
        self._axis_names: dict[int, collectives.AxisName] = {}
        self._spaces: dict[int, tuple[LowRankConfig, LeafSubspace]] = {}
        chosen = set(map(id, lenses))
        spaces = projection_leaves(opt_state, params, layer)
        for lens, (config, leaves, numbers) in zip(low_rank_states(opt_state), spaces, strict=True):
            self._axis_names |= dict.fromkeys(numbers, config.axis_name)
            for number, leaf in zip(numbers, leaves, strict=True):
                if leaf.plan.is_projected and id(lens) in chosen:
                    self._spaces[number] = config, leaf

    def slots(self) -> list[Any]:
        """Per leaf what is differentiated by: the leaf itself, if it is an ordinary array."""
        return [self._slot(number, leaf) for number, leaf in enumerate(self._leaves.values)]

    def attach(self, slots: list[Any]) -> Any:
        """The parameters as the model gets them."""
        pairs = enumerate(zip(self._leaves.values, slots, strict=True))
        return self._leaves.boxed([self._attached(number, *pair) for number, pair in pairs])

    def collect(self, cotangents: list[Any]) -> Any:
        """The gradients, from the cotangents of the slots."""
        gradients = [gradient_of(c) if isinstance(c, CotangentSlots) else c for c in cotangents]
        return self._leaves.boxed(gradients)

    def check_projectors(self) -> None:
        """Raises if a projector needs the gradient itself."""
        for config, leaf in self._spaces.values():
            if config.projector.forms_gradient:
                raise ValueError(
                    f"leaf {leaf.plan.path!r}: {config.projector} needs the gradient itself, which "
                    "a projected backward pass does not form. Use randomized_svd, "
                    "subspace_iteration or random_orthonormal, or jax.value_and_grad."
                )

    def _slot(self, number: int, leaf: Any) -> Any:
        # Gradients stay local to each device: it is the lens that takes their mean, and of R.
        local = functools.partial(collectives.varying, axis_name=self._axis_names.get(number))
        if number not in self._spaces:
            quantized = isinstance(leaf, QuantizedArray)
            return local(jnp.zeros(leaf.shape, leaf.dtype) if quantized else leaf)
        config, space = self._spaces[number]
        slots = zero_slots(space, config, subspace.decode(config, space.plan, space.stored))
        return dataclasses.replace(slots, value=local(slots.value))

    def _attached(self, number: int, leaf: Any, slot: Any) -> Any:
        if number not in self._spaces:
            label = Label(self._leaves.paths[number])
            return DifferentiableWeight(leaf, slot, label) if is_one_leaf(leaf) else slot
        config, space = self._spaces[number]
        return ProjectedWeight(
            weight=jax.lax.stop_gradient(leaf),
            slots=slot,
            space=space._replace(plan=None),  # type: ignore[arg-type]  # static
            plan=space.plan,
            config=config,
        )
