"""A training step that updates each block as soon as its gradient is there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.layerwise.clipping import (
    check_max_norm,
    clip_factor,
    norm_dtype,
    scaled,
    square_sum,
    squares_by_path,
)
from galore_jax.layerwise.devices import Devices, devices_of
from galore_jax.layerwise.guard import guard_for
from galore_jax.layerwise.inspection import inspector
from galore_jax.layerwise.outside import known_early
from galore_jax.layerwise.pullback import Pullback, pullback
from galore_jax.layerwise.update import Finite, updated
from galore_jax.layerwise.walk import Forward, Layer, Model, backward, forward
from galore_jax.views.leaves import leaf_paths


class Metrics(NamedTuple):
    """What a step reports.

    Args:
      loss: The loss before the step, the mean over devices.
      grad_norm: Global norm of the gradient, before clipping. Of several devices: of their mean, if
        that is clipped; else the root of the mean of their squares, which is not below it.
      skipped: int32, how many updates were skipped because something was not finite: each block
        counts one, and everything outside them one, if any leaf of it was.
      aux: What else the head returned, floating arrays averaged over devices; None without
        ``has_aux``.
    """

    loss: jax.Array
    grad_norm: jax.Array
    skipped: jax.Array
    aux: Any


# (params, opt_state, batch, key) -> (params, opt_state, metrics)
Step = Callable[..., tuple[Any, Any, Metrics]]


def train_step(
    embed: Callable[[Any, Any], Any],
    block: Callable[[Any, Any], Any],
    head: Callable[[Any, Any, Any], Any],
    tx: optax.GradientTransformation,
    *,
    blocks: str = "blocks",
    has_aux: bool = False,
    clip_norm: float | None = None,
    skip_nonfinite: bool = True,
    layers_alone: bool = False,
    pullback: Pullback = pullback,
) -> Step:
    r"""A step of which at most one block's gradient exists at a time.

    The forward pass keeps the input of every block; the backward pass walks from the last block to
    the first, and for each one

    .. math::
      (g_l, \bar x_l) = \mathrm{vjp}(\mathrm{block}, \theta_l, x_l)(\bar x_{l+1}), \qquad
      (\theta_l, s_l) \leftarrow \mathrm{tx}(g_l, s_l, \theta_l)

    in the place of its parameters and its state; what is outside the blocks follows at the end. The
    numbers are those of an ordinary step, ``tx.update`` and `galore_jax.apply_updates` after
    `quant.value_and_grad`, and the two can take turns: the state is ``tx.init(params)``.

    Weights that are stored as codes are decoded one block at a time, if the model multiplies with
    `galore_jax.matmul`. Compile it with donated buffers, and on a CPU with one more option, without
    which every iteration copies the whole state::

      jax.jit(step, donate_argnums=(0, 1), compiler_options={
          "xla_cpu_copy_insertion_use_region_analysis": True})   # on a CPU only

    With `galore_jax.accumulate` around all of `tx` every call is a micro-batch. A block adds its
    projected gradient to its sums, and is updated on the last call of a window.

    In `jax.shard_map` or `jax.pmap`, where every device has a share of the batch, give the lenses
    of `tx` an `axis_name`. They reduce what they reduce in an ordinary step; leaves that no such
    lens sees, the loss and what is reported are averaged here. All devices skip together.

    Args:
      embed: ``(params, batch) -> x``, where `params` is everything outside the blocks and `x` holds
        floating arrays.
      block: ``(layer_params, x) -> x``, one layer; `layer_params` lacks the layer axis.
      head: ``(params, x, batch) -> loss``, a scalar, where `params` is everything outside the
        blocks; or ``(loss, aux)``.
      tx: Any transformation that treats each layer of each leaf by itself, chains, masks and
        partitions included. One that does not is refused by name when the step is traced. In
        `jax.shard_map` and `jax.pmap` a lens in it has to know the `axis_name`: without one nothing
        is averaged, and devices drift apart.
      blocks: The entry of the parameters that holds the stacked layers, ``[layers, ...]`` each.
      has_aux: Whether `head` returns a pair.
      clip_norm: Clips by the global norm of this step's gradient, as `optax.clip_by_global_norm` in
        front of `tx` would. It has to be known before the first update, so that the blocks are
        walked twice, and between devices gradients are reduced as they are, not projected (unless
        `pullback` projects). `layerwise.clip_by_previous_norm` needs neither. In a window it clips
        each micro-batch by itself.
      skip_nonfinite: A step whose loss is not finite changes nothing. With a finite loss, a block
        keeps its parameters and its state if its own gradient is not finite, and outside the blocks
        every leaf does so by itself; counts advance. With a window anywhere in the state such a
        gradient counts as zero instead. With `clip_norm` the norm is known in time: if it is not
        finite, nothing changes. `optax.apply_if_finite` would need all gradients.
      layers_alone: Accept a `tx` that mixes the layers of a leaf (`optax.clip_by_block_rms`, trust
        ratios), and apply it to each layer alone: what it does to layers that are not stacked.
      pullback: How the gradient of each piece is taken. `galore_jax.backward.pullback` never forms
        the gradients of projected matrices, not even of one block.

    Returns:
      ``step(params, opt_state, batch, key=None) -> (params, opt_state, metrics)``, a pure function
      to be jitted. `key` rounds INT8 and bf16 parameters stochastically, as in
      `galore_jax.apply_updates`; another one at every step.

    Raises:
      ValueError: A bad `clip_norm` here. When the step is traced: no stacked layers under `blocks`,
        a state that was not made for these parameters, or a `tx` that couples layers.
      TypeError: When it is traced: a parameter that is not real and floating.

    Example:
      >>> import jax, jax.numpy as jnp, galore_jax as gj
      >>> from galore_jax import layerwise
      >>> params = {"embed": jnp.ones((8, 4)), "blocks": {"w": jnp.ones((3, 4, 4))}}
      >>> tx = gj.galore_adamw(1e-2, rank=2, axes=gj.MatrixAxes(-2, -1))
      >>> step = layerwise.train_step(
      ...     lambda params, tokens: params["embed"][tokens],
      ...     lambda layer, x: x + jnp.tanh(x @ layer["w"]),
      ...     lambda params, x, tokens: jnp.mean(x**2),
      ...     tx,
      ... )
      >>> step = jax.jit(step, donate_argnums=(0, 1))
      >>> params, opt_state, metrics = step(params, tx.init(params), jnp.arange(8))
      >>> int(metrics.skipped)
      0

    References:
      Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources",
      2023 (https://arxiv.org/abs/2306.09782); Zhao et al., "GaLore: Memory-Efficient LLM Training
      by Gradient Low-Rank Projection", 2024, section 4.3 (https://arxiv.org/abs/2403.03507).
    """
    if clip_norm is not None:
        check_max_norm("clip_norm", clip_norm)
    tx = optax.with_extra_args_support(tx)
    inspect = inspector(tx, blocks=blocks, layers_alone=layers_alone)
    is_finite = jnp.isfinite if skip_nonfinite else _always
    find_clip = _no_clip if clip_norm is None else functools.partial(_exact_clip, clip_norm)

    def step(
        params: Any, opt_state: Any, batch: Any, key: jax.Array | None = None
    ) -> tuple[Any, Any, Metrics]:
        whole, axes, reads = inspect(Layer(params, opt_state))
        stacked, first = axes.stacked(whole), axes.slice(whole, 0)
        guard, devices = guard_for(whole.opt_state), devices_of(whole.opt_state)
        model = Model(embed, block, head, blocks, has_aux, devices.local(pullback))
        passed = forward(model, params[blocks], first, batch)
        loss, aux = devices.reported((passed.loss, passed.aux))
        clip = find_clip(devices, model, passed, functools.partial(axes.slice, whole))
        healthy = is_finite(loss) & is_finite(clip.factor)

        def update(here: Layer, gradients: Any, finite: Finite, **options: Any) -> Layer:
            gradients, finite = guard(scaled(devices.left_over(gradients), clip.factor), finite)
            return updated(tx, reads, key, here, gradients, finite=finite, **options)

        def finite(squares: dict[str, jax.Array]) -> Finite:
            return lambda names: _all(
                [healthy, *(is_finite(squares[name]) for name in names if name in squares)]
            )

        soon = known_early(model, reads, first, batch)
        squares = devices.reported(squares_by_path(model.outer(passed.outer), soon.names))
        early = update(first, passed.outer, finite(squares))
        early, cotangent = soon.before(early, passed.cotangent)
        passed = passed._replace(cotangent=cotangent)

        def layer_of(carry: _Carry, number: jax.Array) -> Layer:
            return axes.joined(whole, axes.cut(carry.stacked, number))

        def visit(carry: _Carry, number: jax.Array, here: Layer, gradients: Any) -> _Carry:
            square = devices.mean(square_sum(gradients[blocks]))
            fine = healthy & is_finite(square)
            new = update(here, gradients, lambda names: fine if names else healthy, layer=number)
            return _Carry(
                axes.paste(carry.stacked, axes.stacked(new), number),
                carry.squares + square,
                carry.skipped + ~fine,
            )

        zero = jnp.zeros((), norm_dtype(params))
        start = _Carry(stacked, zero, jnp.zeros((), jnp.int32))
        carry, gradients = backward(model, passed, start, layer_of, visit)

        outside = model.outer(gradients)
        late_names = set(leaf_paths(outside)) - soon.names
        squares = squares | devices.reported(squares_by_path(outside, late_names))
        norm = clip.norm_or(jnp.sqrt(sum(squares.values(), start=carry.squares)))
        final = layer_of(carry, jnp.zeros((), jnp.int32))
        late = update(final, gradients, finite(squares), norm=norm)
        params, opt_state = axes.joined(soon.merge(early, late), carry.stacked)
        skipped = carry.skipped + ~finite(squares)(frozenset(squares))
        return params, opt_state, Metrics(loss, norm, skipped, aux)

    return step


class _Carry(NamedTuple):
    """What is handed from block to block."""

    stacked: list[jax.Array]
    squares: jax.Array
    skipped: jax.Array


class _Clip(NamedTuple):
    """What multiplies every gradient, and the norm that this is from, if it has been taken."""

    factor: jax.Array
    norm: jax.Array | None = None

    def norm_or(self, other: jax.Array) -> jax.Array:
        return other if self.norm is None else self.norm


_LayerAt = Callable[[jax.Array], Layer]


def _no_clip(devices: Devices, model: Model, passed: Forward, layer_at: _LayerAt) -> _Clip:
    del devices, model, layer_at
    return _Clip(jnp.ones((), passed.loss.dtype))


def _exact_clip(
    max_norm: float, devices: Devices, model: Model, passed: Forward, layer_at: _LayerAt
) -> _Clip:
    """From a walk that changes nothing; the factor is NaN if the norm is not finite."""

    def visit(squares: jax.Array, number: jax.Array, here: Layer, gradients: Any) -> jax.Array:
        del number
        return squares + devices.square_sum(gradients[model.blocks])

    dtype = norm_dtype(passed.outer)
    squares, outer = backward(
        model, passed, jnp.zeros((), dtype), lambda _, number: layer_at(number), visit
    )
    norm = jnp.sqrt(squares + devices.square_sum(model.outer(outer)))
    return _Clip(jnp.where(jnp.isfinite(norm), clip_factor(norm, max_norm), jnp.nan), norm)


def _always(x: jax.Array) -> jax.Array:
    return jnp.ones_like(x, bool)


def _all(conditions: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.logical_and, conditions)
