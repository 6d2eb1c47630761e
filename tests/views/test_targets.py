"""Which leaves take part: the papers' rule on the names people use, and how to override it."""

import jax.numpy as jnp
import optax
import pytest

import galore_jax as gj
from galore_jax.views.targets import default_targets

PROJECTED = [
    "layers/attention/query/kernel", "layers_0/Attention_0/Dense_0/kernel", "layers/mlp/up/kernel",
    "model/layers/3/self_attn/q_proj/weight", "h/0/attn/c_attn/kernel", "h/0/mlp/c_fc/kernel",
    "blocks/0/w", "w", "transformer/h/0/attn/c_proj/weight", "Dense_0/kernel", "layers/gate_proj",
    "encoder/layers/linear1/weight", "layers/attn/wo", "head_proj/kernel", "layers/down",
    "layers/rescale_free/kernel", "unbiased/kernel", "classifier/kernel",
]  # fmt: skip
LEFT_OUT = [
    "embed/embedding", "embed_tokens/weight", "model/embed_tokens/weight", "Embed_0/embedding",
    "tok_embeddings/weight", "token_embedding", "transformer/wte/weight", "transformer/wpe/weight",
    "pos_embed", "embedder/input_embedding", "embedding", "unembed/kernel", "lm_head/kernel",
    "lm_head", "output_head/kernel", "logits/kernel",
    "layers/input_layernorm/weight", "layers/post_attention_layernorm/scale", "norm/scale",
    "layers/attention_norm/weight", "RMSNorm_0/scale", "LayerNorm_0/bias", "h/0/ln_1/weight",
    "ln_f/scale", "ln_f", "h/0/ln_2/bias", "layers/norm1/scale", "final_norm", "layers/scale",
    "layers/q_norm", "layers/bias", "layers/attn/query_bias", "layers/attn/query/bias",
    "ln", "layers/ln/weight",
]  # fmt: skip


@pytest.mark.parametrize("path", PROJECTED)
def test_takes_matrices(path):
    assert default_targets(path, None)


@pytest.mark.parametrize("path", LEFT_OUT)
def test_leaves_out_embeddings_head_norms_and_biases(path):
    assert not default_targets(path, None)
    params = {path: jnp.zeros((32, 16))}  # two axes, like a scanned stack of norm scales
    assert projected(params) == []
    assert projected(params, targets=gj.all_matrices) == [path]


def projected(params, **options):
    tx = gj.low_rank_projection(optax.identity(), 2, **options)
    return [p.path for p in gj.views.leaf_plan(tx.init({}).config, params) if p.is_projected]


PARAMS = {
    "embed": jnp.zeros((32, 16)),
    "layers": {
        "attn": {"q": jnp.zeros((16, 16)), "bias": jnp.zeros((16,))},
        "mlp": jnp.zeros((16, 24)),
        "norm": jnp.zeros((3, 16)),
    },
    "step": jnp.zeros((16, 4), jnp.int32),
}


def test_the_default():
    assert projected(PARAMS) == ["layers/attn/q", "layers/mlp"]


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("attn|mlp", ["layers/attn/q", "layers/mlp"]),
        ("attn", ["layers/attn/q"]),
        ("^layers/mlp$", ["layers/mlp"]),
        ("embed", ["embed"]),
        ("Attn", []),
        ("bias", []),  # no matrix, asked for or not
        (lambda path, leaf: leaf.shape[0] == 32, ["embed"]),
        (lambda path, leaf: path.endswith("q"), ["layers/attn/q"]),
        (gj.all_matrices, ["embed", "layers/attn/q", "layers/mlp", "layers/norm"]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_overrides(targets, expected):
    assert projected(PARAMS, targets=targets) == expected


def test_reasons_are_told():
    config = gj.low_rank_projection(optax.identity(), 2, targets="attn").init({}).config
    reasons = {p.path: p.reason for p in gj.views.leaf_plan(config, PARAMS)}
    assert reasons["embed"] == "not in targets"
    assert reasons["layers/attn/q"] == "projected"
    assert reasons["layers/attn/bias"] == "fewer than two axes"


@pytest.mark.parametrize("targets", [3, ["attn"], b"attn"])
def test_wrong_kind(targets):
    with pytest.raises(TypeError, match="regex"):
        gj.low_rank_projection(optax.identity(), 2, targets=targets)


def test_bad_regex():
    with pytest.raises(ValueError, match=r"'\(attn'"):
        gj.low_rank_projection(optax.identity(), 2, targets="(attn")
