"""Ranks, and the outcome on whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj
from galore_jax.rules import Rule
from galore_jax.views.plan import rank_rule


def plan(params, rank=4, **options):
    config = gj.low_rank_projection(optax.identity(), rank, **options).init({}).config
    return {p.path: p for p in gj.views.leaf_plan(config, params)}


def ranks(params, rank=4, **options):
    return {path: leaf.rank for path, leaf in plan(params, rank, **options).items() if leaf.rank}


def zeros(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def llama(scanned, kernel="kernel", norm="scale"):
    """A Llama of two layers with names as in Flax (or PyTorch), stacked or not."""

    def layer(*lead):
        def dense(*shape):
            return {kernel: zeros(*lead, *shape)}

        bias = {"bias": zeros(*lead, 16)}
        return {
            "input_layernorm": {norm: zeros(*lead, 16)},
            "self_attn": {name: dense(16, 16) for name in ("q_proj", "k_proj", "o_proj")},
            "mlp": {"gate_proj": dense(16, 40), "down_proj": dense(40, 16) | bias},
        }  # fmt: skip

    return {
        "embed_tokens": {"embedding": zeros(100, 16)},
        "layers": layer(2) if scanned else [layer(), layer()],
        "norm": {norm: zeros(16)},
        "lm_head": {kernel: zeros(16, 100)},
    }


MATRICES = {f"self_attn/{name}" for name in ("q_proj", "k_proj", "o_proj")} | {
    "mlp/gate_proj",
    "mlp/down_proj",
}


@pytest.mark.parametrize("kernel, norm", [("kernel", "scale"), ("weight", "weight")])
def test_a_llama_layer_by_layer(kernel, norm):
    names = {f"layers/{i}/{name}/{kernel}" for i in range(2) for name in MATRICES}
    assert ranks(llama(False, kernel, norm)) == dict.fromkeys(names, 4)


@pytest.mark.parametrize("kernel, norm", [("kernel", "scale"), ("weight", "weight")])
def test_a_scanned_llama(kernel, norm):
    """Stacked kernels need `axes`; stacked norm scales and biases are never matrices."""
    params = llama(True, kernel, norm)
    assert ranks(params) == {}
    seen = plan(params, axes=gj.MatrixAxes())
    names = {f"layers/{name}/{kernel}" for name in MATRICES}
    assert {path for path, leaf in seen.items() if leaf.is_projected} == names
    assert seen[f"layers/mlp/down_proj/{kernel}"].view.batch_shape == (2,)
    assert seen[f"layers/mlp/down_proj/{kernel}"].view.kept_size == 40


def test_a_linen_model():
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Embed(30, 8)(x)
            x = nn.RMSNorm()(nn.Dense(12)(x))
            x = nn.LayerNorm(name="ln_f")(x)
            return nn.Dense(30, name="lm_head", use_bias=False)(x)

    shapes = jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros((2, 3), jnp.int32))
    assert ranks(shapes) == {"params/Dense_0/kernel": 4}


def test_a_gpt2_tree():
    block = {
        "ln_1": {"g": zeros(16)},
        "attn": {"c_attn": {"w": zeros(16, 48), "b": zeros(48)}},
        "ln_2": {"g": zeros(16)},
    }
    params = {"wte": zeros(99, 16), "wpe": zeros(32, 16), "h": [block], "ln_f": {"g": zeros(16)}}
    assert ranks(params) == {"h/0/attn/c_attn/w": 4}


@pytest.mark.parametrize(
    "rank, side, shape, expected",
    [
        (4, "short", (10, 6), 4),
        (5, "short", (10, 6), 5),
        (6, "short", (10, 6), 0),  # reaches the projected dimension
        (100, "short", (10, 6), 0),
        (100, "long", (10, 6), 6),  # never above the kept dimension
        (100, "output", (3, 10), 3),
        (100, "input", (3, 10), 0),
        (np.int64(4), "short", (10, 6), 4),
        (0.5, "short", (10, 6), 3),
        (0.5, "long", (10, 6), 5),
        (0.9, "long", (10, 6), 6),
        (1e-6, "short", (10, 6), 1),
        (1.0, "short", (10, 6), 0),
        (lambda path, leaf: leaf.shape[0] // 5, "short", (10, 6), 2),
        (lambda path, leaf: {"w": 0.5}[path], "short", (10, 6), 3),
        (lambda path, leaf: None, "short", (10, 6), 0),
        (1, "short", (2, 2), 1),
        (1, "short", (1, 9), 0),
        (1, "short", (9, 1), 0),
        (7, "short", (8, 8), 7),
    ],
)
def test_effective_rank(rank, side, shape, expected):
    leaf = plan({"w": zeros(*shape)}, rank, side=side)["w"]
    assert leaf.rank == expected and leaf.is_projected == bool(expected)
    assert isinstance(leaf.rank, int) and isinstance(rank_rule(rank), int | float | Rule)


@pytest.mark.parametrize(
    "leaf, options, reason, is_matrix",
    [
        (zeros(6), {}, "two axes", False),
        (zeros(2, 10, 6), {}, "`axes`", True),
        (zeros(1, 1, 6), {}, "`axes`", False),
        (zeros(10, 6), {"rank": 9}, "rank 9 reaches the projected dimension 6", True),
        (zeros(10, 6), {"rank": 1.0}, "rank 1.0 reaches the projected dimension 6", True),
        (zeros(10, 6), {"rank": lambda path, leaf: 7}, "rank 7 reaches", True),
        (zeros(1, 6), {"rank": 1}, "reaches the projected dimension 1", False),
        (zeros(10, 6), {"rank": lambda path, leaf: None}, "None", True),
        (zeros(10, 6), {"targets": "x"}, "targets", False),
        (zeros(10, 6), {"targets": lambda path, leaf: leaf.ndim == 3}, "targets", False),
        (zeros(10, 6, dtype=jnp.int32), {}, "floating", False),
        (zeros(10, 6, dtype=jnp.complex64), {}, "floating", False),
        (zeros(10, 6), {"axes": {"w": None}}, "None", True),
        (zeros(10, 6), {"axes": {"w": None}, "targets": "x"}, "None", False),
        (zeros(10, 6), {}, "projected", True),
    ],
)
def test_reasons(leaf, options, reason, is_matrix):
    seen = plan({"w": leaf}, **options)["w"]
    assert reason in seen.reason and seen.is_matrix == is_matrix


def test_callables_get_shapes():
    def shapes_only(path, leaf):
        return type(leaf) is jax.ShapeDtypeStruct and 4

    assert ranks({"w": jnp.zeros((10, 6))}, shapes_only, targets=shapes_only) == {"w": 4}


def test_plans_are_pure_functions_of_shapes():
    params = llama(True)
    concrete = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    assert plan(params, axes=gj.MatrixAxes()) == plan(concrete, axes=gj.MatrixAxes())
    assert list(plan(params)) == [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    assert plan({}) == {} and plan(None) == {}


def test_low_precision_and_double_leaves_are_floating():
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float64):
        assert plan({"w": zeros(10, 6, dtype=dtype)})["w"].is_projected
