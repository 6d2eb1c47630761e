"""A training step that updates each block as soon as its gradient is there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_jax.backward import pullback
from galore_jax.layerwise.clipping import (
    check_max_norm,
    clip_factor,
    norm_dtype,
    scaled,
    square_sum,
    squares_of,
)
from galore_jax.layerwise.coupling import check_layers_apart, reads_of
from galore_jax.layerwise.devices import Devices, devices_of
from galore_jax.layerwise.passes import Forward, Model, Pullback, backward, forward
from galore_jax.layerwise.slices import Layer, block_leaves, layer_axes
from galore_jax.layerwise.update import Finite, early_update, nonfinite_of, updated
from galore_jax.transforms.lenses import with_configs


class Metrics(NamedTuple):
    """Report of a step.

    Args:
      loss: The loss before the step, the mean over devices.
      grad_norm: Global norm of the gradient, before clipping. Of several devices: of their mean, if
        that is clipped; else the root of the mean of their squares, which is not below it.
      skipped: int32, how many updates were skipped because something was not finite: each block
        counts one, and everything outside them one, if any leaf of it was.
      aux: Second result of the head, floating arrays averaged over devices; None without
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
    pullback: Pullback = pullback,
) -> Step:
    r"""A step of which at most one block's gradient exists at a time.

    The forward pass keeps the input of every block; the backward pass goes from the last block to
    the first, and for each one

    .. math::
      (g_l, \bar x_l) = \mathrm{vjp}(\mathrm{block}, \theta_l, x_l)(\bar x_{l+1}), \qquad
      (\theta_l, s_l) \leftarrow \mathrm{tx}(g_l, s_l, \theta_l)

    in the place of its parameters and its state; what is outside the blocks follows at the end. The
    numbers are those of an ordinary step, ``tx.update`` and `galore_jax.apply_updates` after
    `projected_value_and_grad`, and the two can take turns: the state is ``tx.init(params)``.

    Gradients of projected matrices are never formed, not even of one block (`backward.pullback`
    says where they are): multiply with `galore_jax.matmul` or ``x @ w``, in one product each, and
    decode a weight with two of them once, with ``w.astype(dtype)``.

    Every layer is updated alone. A transformation that takes a statistic over a whole leaf
    (`optax.clip_by_block_rms`, trust ratios, Adafactor's clip) takes that of one layer: what it
    does to layers that are not stacked. So does one over the blocks alone (a masked
    `optax.clip_by_global_norm`), and a `jnp.arange` over the layers is that of one layer: the extra
    argument ``layer`` of update is its number.

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
      tx: Any transformation, chains, masks and partitions included. One in which a block and what
        is outside the blocks depend on each other, or blocks on random numbers without the extra
        argument ``layer`` in their key, is refused by name when the step is traced. In
        `jax.shard_map` and `jax.pmap` a lens in it has to know the `axis_name`: without one nothing
        is averaged, and devices drift apart.
      blocks: The entry of the parameters that holds the stacked layers, ``[layers, ...]`` each.
      has_aux: Whether `head` returns a pair.
      clip_norm: Clips by the global norm of this step's gradient, as `optax.clip_by_global_norm` in
        front of `tx` would; of projected gradients it is the norm of R. It has to be known before
        the first update, so that the blocks are passed backwards twice, and gradients that are
        formed are reduced between devices at full size. `layerwise.clip_by_previous_norm` needs
        neither. In a window it clips each micro-batch by itself.
      skip_nonfinite: A step whose loss is not finite changes nothing. With a finite loss, a block
        keeps its parameters and its state if its own gradient is not finite, and outside the blocks
        every leaf does so by itself; counts advance. With a window anywhere in the state such a
        gradient counts as zero instead. With `clip_norm` the norm is known in time: if it is not
        finite, nothing changes. `optax.apply_if_finite` would need all gradients.
      pullback: Takes the gradient of each piece, called as `backward.pullback`.

    Returns:
      ``step(params, opt_state, batch, key=None) -> (params, opt_state, metrics)``, a pure function
      to be jitted. `key` rounds INT8 and bf16 parameters stochastically, as in
      `galore_jax.apply_updates`; another one at every step.

    Raises:
      ValueError: A bad `clip_norm` here. When the step is traced: no stacked layers under `blocks`,
        a state that was not made for these parameters, a `tx` that couples blocks with the rest, or
        a projected leaf outside the blocks that `embed` and `head` both read.
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
    is_finite = jnp.isfinite if skip_nonfinite else functools.partial(jnp.ones_like, dtype=bool)
    find_clip = _no_clip if clip_norm is None else functools.partial(_exact_clip, clip_norm)

    def step(
        params: Any, opt_state: Any, batch: Any, key: jax.Array | None = None
    ) -> tuple[Any, Any, Metrics]:
        inside = block_leaves(params, blocks)
        whole = Layer(params, with_configs(opt_state, tx, params))
        axes = layer_axes(tx, whole, blocks, inside)
        check_layers_apart(whole, inside)
        stacked, first = axes.stacked(whole), axes.slice(whole, 0)
        nonfinite, devices = nonfinite_of(whole.opt_state), devices_of(whole)
        model = Model(embed, block, head, blocks, has_aux, devices.local(pullback))
        passed = forward(model, params[blocks], first, batch)
        loss, aux = devices.reported((passed.loss, passed.aux))
        clip = find_clip(devices, model, passed, functools.partial(axes.slice, whole))
        healthy = is_finite(loss) & is_finite(clip.factor)

        def prepared(gradients: Any) -> Any:
            return scaled(devices.left_over(gradients), clip.factor)

        # Traced once, for the check and for every update.
        @functools.partial(jax.jit, inline=True)
        def run(layer: Any, norm: Any, gradients: Any, opt_state: Any, params: Any) -> Any:
            return tx.update(gradients, opt_state, params, layer=layer, grad_norm=norm)

        at_first = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        gradients = prepared(passed.outer)
        traced = run.trace(*at_first, gradients, first.opt_state, first.params)
        reads = reads_of(traced, first, gradients, axes, inside)

        def update(
            here: Layer, gradients: Any, finite: Finite, layer: Any, norm: Any = at_first[1]
        ) -> Layer:
            gradients, finite = nonfinite(prepared(gradients), finite)
            return updated(run, reads, key, here, gradients, finite=finite, layer=layer, norm=norm)

        def finite(squares: dict[int, jax.Array]) -> Finite:
            return lambda numbers: functools.reduce(
                jnp.logical_and, [is_finite(squares[n]) for n in numbers if n in squares], healthy
            )

        soon = early_update(model, reads, inside, first, batch, passed)
        squares = devices.reported(squares_of(passed.outer, soon.numbers))
        early = update(first, passed.outer, finite(squares), at_first[0])
        early, cotangent = soon.before(early, passed.cotangent)
        passed = passed._replace(cotangent=cotangent)

        def layer_of(carry: _Carry, number: jax.Array) -> Layer:
            return axes.joined(whole, axes.cut(carry.stacked, number))

        def visit(carry: _Carry, number: jax.Array, here: Layer, gradients: Any) -> _Carry:
            square = devices.mean(square_sum(gradients[blocks]))
            fine = healthy & is_finite(square)
            new = update(here, gradients, lambda read: fine if read else healthy, number)
            return _Carry(
                axes.paste(carry.stacked, axes.stacked(new), number),
                carry.squares + square,
                carry.skipped + ~fine,
            )

        zero = jnp.zeros((), norm_dtype(params))
        start = _Carry(stacked, zero, jnp.zeros((), jnp.int32))
        carry, gradients = backward(model, passed, start, layer_of, visit)

        outside = frozenset(n for n, own in enumerate(inside) if not own)
        squares |= devices.reported(squares_of(gradients, outside - soon.numbers))
        norm = jnp.sqrt(sum(squares.values(), start=carry.squares))
        norm = norm if clip.norm is None else clip.norm
        final = layer_of(carry, at_first[0])
        late = update(final, gradients, finite(squares), at_first[0], norm.astype(jnp.float32))
        params, opt_state = axes.joined(soon.merge(early, late), carry.stacked)
        skipped = carry.skipped + ~finite(squares)(outside)
        return params, opt_state, Metrics(loss, norm, skipped, aux)

    return step


class _Carry(NamedTuple):
    """Values that are handed from block to block."""

    stacked: list[jax.Array]
    squares: jax.Array
    skipped: jax.Array


class _Clip(NamedTuple):
    """Factor on every gradient, and the norm that it is from, if that has been taken."""

    factor: jax.Array
    norm: jax.Array | None = None


_LayerAt = Callable[[jax.Array], Layer]


def _no_clip(devices: Devices, model: Model, passed: Forward, layer_at: _LayerAt) -> _Clip:
    del devices, model, layer_at
    return _Clip(jnp.ones((), passed.loss.dtype))


def _exact_clip(
    max_norm: float, devices: Devices, model: Model, passed: Forward, layer_at: _LayerAt
) -> _Clip:
    """From a pass that changes nothing; the factor is NaN if the norm is not finite."""

    def visit(squares: jax.Array, number: jax.Array, here: Layer, gradients: Any) -> jax.Array:
        del number
        return squares + devices.square_sum(gradients[model.blocks])

    dtype = norm_dtype(passed.outer)
    squares, outer = backward(
        model, passed, jnp.zeros((), dtype), lambda _, number: layer_at(number), visit
    )
    norm = jnp.sqrt(squares + devices.square_sum(model.outer(outer)))
    return _Clip(jnp.where(jnp.isfinite(norm), clip_factor(norm, max_norm), jnp.nan), norm)
