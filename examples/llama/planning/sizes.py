"""The numbers that the memory of a step is made of, on one device."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

import galore_jax as gj
from examples.llama import mesh
from examples.llama.optimizers import is_block_matrix, path_name
from examples.llama.planning.run import Run

FP32 = 4


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Bytes of gradients in the form that the optimizer gets them.

    Args:
        total: all of them: in the dtype of the parameters, those that arrive projected in fp32 and
            with the basis that they were taken in.
        layer: those of one block.
        sums: what micro-batches are summed up in; 0 with one.
        shapes: one gradient of each shape, in full.
        largest_low_rank: the largest projected one of one block; 0 without a lens.
    """

    total: int
    layer: int
    sums: int
    shapes: int
    largest_low_rank: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One step on one device. Sizes of the model are those of the device's share.

    Args:
        rows: sequences of a pass (B).
        length: tokens of each (S).
        width: of the residual stream (D).
        inner: of the MLP (F).
        vocab: entries of the vocabulary (V).
        heads: of attention.
        layers: blocks (L).
        item: bytes of an activation.
        param_item: bytes of an entry of a parameter and of its gradient.
        remat: whether activations are computed again.
        layerwise: whether blocks are updated one by one.
        clipped: whether gradients are clipped by their global norm.
        projected: whether the backward pass projects.
        coded: whether weights of blocks are decoded before they are multiplied with.
        queries: tokens whose scores exist at once; 0 with a kernel that has none.
        head_tokens: tokens of a sequence whose logits exist at once.
        layer: bytes of the weights of a block as they are multiplied with.
        matrix: of the largest of them.
        params: bytes of all parameters in their dtype, as updates are.
        state: bytes of the optimizer state.
        in_place: whether the update is arithmetic alone, which XLA does in the place of the state:
            loops and branches (lenses, codes) get a place of their own for the new one.
        gradients: see `Gradients`.
    """

    rows: int
    length: int
    width: int
    inner: int
    vocab: int
    heads: int
    layers: int
    item: int
    param_item: int
    remat: bool
    layerwise: bool
    clipped: bool
    projected: bool
    coded: bool
    queries: int
    head_tokens: int
    layer: int
    matrix: int
    params: int
    state: int
    in_place: bool
    gradients: Gradients

    @property
    def tokens(self) -> int:
        """Of a pass (T)."""
        return self.rows * self.length


def sizes_of(run: Run) -> Sizes:
    """The numbers of a run."""
    llama, settings = run.llama, run.settings
    axes = dict(run.devices.shape)
    split = axes.get("tensor", 1)
    copies = math.prod(axes.get(name, 1) for name in mesh.BATCH_AXES)
    item = jnp.dtype(llama.dtype).itemsize
    logical = _logical(run)
    kernels = [x for name, x in logical.items() if is_block_matrix(name)]
    matrices = [math.prod(x.shape[1:]) * item // split for x in kernels]
    in_one_piece = llama.attention_chunk is None or llama.attention_chunk >= settings.data.seq_len
    projected = settings.optimizer.backward == "projected"
    return Sizes(
        rows=settings.data.batch_size // settings.data.accumulation // copies,
        length=settings.data.seq_len,
        width=llama.hidden_size,
        inner=llama.intermediate_size // split,
        vocab=llama.vocab_size // split,
        heads=max(llama.num_heads // split, 1),
        layers=llama.num_layers,
        item=item,
        param_item=jnp.dtype(llama.param_dtype).itemsize,
        remat=llama.remat or settings.schedule.layerwise,
        layerwise=settings.schedule.layerwise,
        clipped=settings.schedule.clip > 0,
        projected=projected,
        coded=settings.model.weights == "int8",
        queries=0
        if llama.attention == "cudnn"
        else settings.data.seq_len
        if in_one_piece
        else llama.attention_chunk,
        head_tokens=llama.head_chunk or settings.data.seq_len,
        layer=sum(matrices),
        matrix=max(matrices),
        params=sum(map(_local_bytes, logical.values())),
        state=mesh.bytes_per_device(run.state.opt_state),
        in_place=settings.optimizer.optimizer in ("adamw", "adafactor"),
        gradients=_gradients(run, logical, projected),
    )


def _logical(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter by its path, in floating point, with its place."""
    shapes = jax.eval_shape(gj.quant.dequantize_params, run.state.params)
    named = jax.tree_util.tree_leaves_with_path(shapes)
    return {
        path_name(path): jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=NamedSharding(run.devices, mesh.param_spec(run.devices, path_name(path))),
        )
        for path, x in named
    }


def _local_bytes(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _gradients(run: Run, logical: dict[str, jax.ShapeDtypeStruct], projected: bool) -> Gradients:
    plans = _plans(run) if projected else {}
    sizes, widest = {}, 0
    for name, leaf in logical.items():
        plan = plans.get(name)
        if plan is None:
            sizes[name] = _local_bytes(leaf)
            continue
        shares = leaf.size // math.prod(leaf.sharding.shard_shape(leaf.shape))
        matrices, into, out = leaf.shape
        over, kept = (into, out) if plan.side == "input" else (out, into)
        value = matrices * kept * plan.rank * FP32
        basis = matrices * over * plan.rank * FP32
        sizes[name] = (value + basis) // shares
        widest = max(widest, value // run.llama.num_layers // shares)
    block = sum(size for name, size in sizes.items() if name.startswith("blocks/"))
    total, micro_batches = sum(sizes.values()), run.settings.data.accumulation > 1
    fp32 = sum(
        x.size * FP32 * _local_bytes(x) // (x.size * x.dtype.itemsize) for x in logical.values()
    )
    return Gradients(
        total=total,
        layer=block // run.llama.num_layers,
        sums=0 if not micro_batches else total if projected else fp32,
        shapes=sum({x.shape: _local_bytes(x) for x in logical.values()}.values()),
        largest_low_rank=widest,
    )


def _plans(run: Run) -> dict[str, Any]:
    """Sides and ranks of the projected leaves."""
    params = jax.eval_shape(gj.quant.dequantize_params, run.state.params)
    return {row.path: row for row in gj.describe(run.task.tx, params).rows if row.projected}
