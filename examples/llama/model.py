"""A Llama whose modules are Flax NNX and whose parameters are a plain nested dictionary.

The modules say what the parameters are and how a layer computes; the functions below them use the
modules statelessly (``nnx.split`` once, ``nnx.merge`` per call), because a plain tree is what an
optimizer and a checkpoint want, and because a backward pass that walks the layers itself needs
``embed``, ``block`` and ``head`` apart. Layers are stacked on a leading axis and scanned::

    embed/embedding [V, D]                 blocks/attn_norm/scale, blocks/mlp_norm/scale [L, D]
    blocks/attn/{q,k,v,o}/kernel [L, D, D] blocks/mlp/{gate,up}/kernel [L, D, F]
    norm/scale [D]                         blocks/mlp/down/kernel [L, F, D]
    lm_head/kernel [D, V]

Kernels are (in, out). Nothing here looks at the shape of a kernel, and every product with one goes
through ``linear``: a kernel may be any pytree node that ``linear`` knows how to multiply with.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import galore_jax as gj
from examples.llama import attention


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and numerics of a Llama; static and hashable.

    Raises:
        ValueError: names the field that makes no model.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # must divide hidden_size into an even head dimension
    max_seq_len: int  # longest sequence that `embed` accepts
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    init_std: float = 0.02  # of every matrix
    dtype: Any = jnp.float32  # of activations, and of weights in products
    param_dtype: Any = jnp.float32
    remat: bool = False  # recompute a layer's activations in the backward pass
    head_chunk: int | None = None  # tokens of a sequence whose logits exist at once; None: all
    attention: str = "auto"  # or "xla", "cudnn"; see `attention.attend`
    attention_chunk: int | None = None  # queries whose scores exist at once; None: all
    activation_sharding: Any = None  # a `NamedSharding` of [B, S, D]; None: the compiler's choice

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")
            if field.type is float and not (
                isinstance(value, int | float) and 0 < value < math.inf
            ):
                raise ValueError(f"{field.name} must be positive and finite, got {value!r}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"hidden_size / num_heads = {self.head_dim} must be even (for RoPE)")
        for name in ("dtype", "param_dtype"):
            # Normalised: "bfloat16" and jnp.bfloat16 are to make equal configurations.
            try:
                dtype = jnp.dtype(getattr(self, name))
            except TypeError:
                dtype = None
            if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"{name} must be a floating dtype, got {getattr(self, name)!r}")
            object.__setattr__(self, name, dtype)
        if self.attention not in attention.KERNELS:
            raise ValueError(
                f"attention must be one of {attention.KERNELS}, got {self.attention!r}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def linear(x: jax.Array, w: Any) -> jax.Array:
    """Multiplies activations by a kernel, in the dtype of the activations.

    The only place where the model does so. x: [..., in], w: [in, out] in whatever form it is
    stored, result: [..., out].
    """
    return gj.matmul(x, w)


def rope(x: jax.Array, theta: float) -> jax.Array:
    """Rotates the features [B, S, heads, head_dim], first half against second, in float32."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.outer(jnp.arange(x.shape[1], dtype=jnp.float32), frequency)  # [S, half]
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class Linear(nnx.Module):
    """A kernel [in, out] without bias."""

    def __init__(self, config: LlamaConfig, in_size: int, out_size: int, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(config.init_std)
        self.kernel = nnx.Param(normal(rngs.params(), (in_size, out_size), config.param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        # get_value, not indexing: the value need not be an array.
        return linear(x, self.kernel.get_value())


class RMSNorm(nnx.Module):
    """Divides by the root mean square in float32, multiplies by a learned scale [D]."""

    def __init__(self, config: LlamaConfig):
        self.eps = config.rms_norm_eps
        self.scale = nnx.Param(jnp.ones((config.hidden_size,), config.param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * inverse_rms * self.scale.get_value().astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head causal self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        size = config.hidden_size
        self.q = Linear(config, size, size, rngs=rngs)
        self.k = Linear(config, size, size, rngs=rngs)
        self.v = Linear(config, size, size, rngs=rngs)
        self.o = Linear(config, size, size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        heads = (*x.shape[:-1], self.config.num_heads, self.config.head_dim)
        q, k, v = (project(x).reshape(heads) for project in (self.q, self.k, self.v))
        theta, kernel, chunk = (
            self.config.rope_theta,
            self.config.attention,
            self.config.attention_chunk,
        )
        mixed = attention.attend(rope(q, theta), rope(k, theta), v, kernel=kernel, chunk=chunk)
        return self.o(mixed.reshape(x.shape))


class MLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        outer, inner = config.hidden_size, config.intermediate_size
        self.gate = Linear(config, outer, inner, rngs=rngs)
        self.up = Linear(config, outer, inner, rngs=rngs)
        self.down = Linear(config, inner, outer, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(config)
        self.attn = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Embed(nnx.Module):
    """The table of token vectors [V, D]."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.dtype = config.dtype
        normal = nnx.initializers.normal(config.init_std)
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(normal(rngs.params(), shape, config.param_dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return jnp.take(self.embedding.get_value(), tokens, axis=0).astype(self.dtype)


class Head(nnx.Module):
    """The last norm and the untied projection to the vocabulary."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.norm = RMSNorm(config)
        self.lm_head = Linear(config, config.hidden_size, config.vocab_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.lm_head(self.norm(x))


@functools.lru_cache(maxsize=64)
def _graphdef(module: type[nnx.Module], config: LlamaConfig) -> nnx.GraphDef:
    # Abstract: the structure of the module without its parameters.
    return nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))[0]


def _params_of(module: type[nnx.Module], config: LlamaConfig, key: jax.Array) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(module(config, rngs=nnx.Rngs(key))))


def _bind(module: type[nnx.Module], config: LlamaConfig, params: Mapping[str, Any]) -> Any:
    return nnx.merge(_graphdef(module, config), params)


def _placed(config: LlamaConfig, x: jax.Array) -> jax.Array:
    # Left alone, the compiler would rather spread the features of sharded weights than the rows.
    if config.activation_sharding is None:
        return x
    return jax.lax.with_sharding_constraint(x, config.activation_sharding)


def init(config: LlamaConfig, key: jax.Array) -> dict[str, Any]:
    """Draws the parameters: arrays in ``config.param_dtype`` (paths in the module docstring)."""
    embed_key, blocks_key, head_key = jax.random.split(key, 3)
    draw_block = functools.partial(_params_of, Block, config)
    return {
        "embed": _params_of(Embed, config, embed_key),
        "blocks": jax.vmap(draw_block)(jax.random.split(blocks_key, config.num_layers)),
        **_params_of(Head, config, head_key),
    }


def num_params(config: LlamaConfig) -> int:
    """Counts the parameters without allocating them."""
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def embed(config: LlamaConfig, params: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
    """Looks tokens up.

    Args:
        config: the model.
        params: parameter tree; only ``"embed"`` is read.
        tokens: int32 [B, S].

    Returns:
        Activations [B, S, D] in ``config.dtype``.

    Raises:
        ValueError: the sequence is longer than ``config.max_seq_len``.
    """
    if tokens.shape[-1] > config.max_seq_len:
        raise ValueError(
            f"sequence length {tokens.shape[-1]} exceeds max_seq_len {config.max_seq_len}"
        )
    return _placed(config, _bind(Embed, config, params["embed"])(tokens))


def block(config: LlamaConfig, layer_params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """Applies one layer to activations [B, S, D].

    Args:
        config: the model.
        layer_params: one layer's slice of ``params["blocks"]``, without the stacking axis.
        x: activations; the result is like them.
    """
    return _placed(config, _bind(Block, config, layer_params)(x))


def head(config: LlamaConfig, params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """Normalises and projects to the vocabulary.

    Args:
        config: the model.
        params: parameter tree; only ``"norm"`` and ``"lm_head"`` are read.
        x: activations [B, S, D].

    Returns:
        Logits [B, S, V] in ``config.dtype``.
    """
    own = {name: params[name] for name in ("norm", "lm_head")}
    return _bind(Head, config, own)(x)


def hidden(config: LlamaConfig, params: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
    """Maps tokens [B, S] to what the head gets to see, [B, S, D]."""
    layer = functools.partial(block, config)
    if config.remat:
        # scan keeps the recomputation apart by itself, the barrier would only cost.
        layer = jax.checkpoint(layer, prevent_cse=False)
    x, _ = jax.lax.scan(
        lambda x, layer_params: (layer(layer_params, x), None),
        embed(config, params, tokens),
        params["blocks"],
    )
    return x


def apply(config: LlamaConfig, params: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
    """Maps tokens [B, S] to logits [B, S, V]."""
    return head(config, params, hidden(config, params, tokens))
