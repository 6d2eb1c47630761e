"""Which leaves take part: the papers' rule on the names people use, and how to override it."""

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_jax as gj
from galore_jax.views.plan import Rules
from galore_jax.views.targets import exemption, targets_rule

EMBEDDING, HEAD, NORM = "embedding ({})", "output head ({})", "norm or bias ({})"
# What is said of a leaf, and under which name; sizes are small except where they decide.
NAMES = {
    # Flax linen
    "params/Dense_0/kernel": None,
    "MultiHeadDotProductAttention_0/out/kernel": None,
    "MultiHeadDotProductAttention_0/query/kernel": None,
    "TransformerBlock_3/MlpBlock_0/Dense_1/kernel": None,
    "params/Embed_0/embedding": EMBEDDING.format("Embed_0"),
    "LayerNorm_0/scale": NORM.format("scale"),
    "RMSNorm_0/scale": NORM.format("scale"),
    "MultiHeadDotProductAttention_0/query/bias": NORM.format("bias"),
    "params/LMHead_0/kernel": HEAD.format("LMHead_0"),
    # Flax NNX
    "blocks/0/attn/out/kernel": None,
    "layers/3/linear1/kernel/value": None,
    "embed/embedding/value": EMBEDDING.format("embed"),
    "blocks/0/norm1/scale/value": NORM.format("scale"),
    # Hugging Face: Llama, GPT-2, BERT, T5, ViT, RoBERTa; Flax and PyTorch
    "model/layers/0/self_attn/o_proj/kernel": None,
    "model.layers.0.mlp.down_proj.weight": None,
    "model/embed_tokens/embedding": EMBEDDING.format("embed_tokens"),
    "model/layers/input_layernorm/weight": NORM.format("input_layernorm"),
    "model.norm.weight": NORM.format("norm"),
    "lm_head/kernel": HEAD.format("lm_head"),
    "score/kernel": HEAD.format("score"),
    "transformer/h/0/attn/c_attn/kernel": None,
    "transformer/wte/embedding": EMBEDDING.format("wte"),
    "transformer/wpe/embedding": EMBEDDING.format("wpe"),
    "transformer/h/ln_1/scale": NORM.format("scale"),
    "transformer/h/ln_1/g": NORM.format("ln_1"),
    "bert/encoder/layer/0/attention/output/dense/kernel": None,
    "bert/encoder/layer_0/output/dense/kernel": None,
    "bert/embeddings/word_embeddings/embedding": EMBEDDING.format("word_embeddings"),
    "bert/embeddings/LayerNorm/weight": NORM.format("LayerNorm"),
    "cls/predictions/decoder/kernel": HEAD.format("predictions"),
    "lm_head/dense/kernel": HEAD.format("lm_head"),
    "encoder/block/0/layer/1/DenseReluDense/wo/kernel": None,
    "shared/embedding": EMBEDDING.format("embedding"),
    "shared.weight": EMBEDDING.format("shared"),
    "block/0/layer/0/SelfAttention/relative_attention_bias/weight": NORM.format(
        "relative_attention_bias"
    ),
    "vit/encoder/layer/0/attention/attention/query/kernel": None,
    "vit/encoder/layer/layernorm_before/weight": NORM.format("layernorm_before"),
    "classifier/kernel": HEAD.format("classifier"),
    "pre_logits/kernel": None,
    # Vision transformer of big_vision
    "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel": None,
    "Transformer/encoderblock/MultiHeadDotProductAttention_0/out/kernel": None,
    "pos_embedding": EMBEDDING.format("pos_embedding"),
    "head/kernel": HEAD.format("head"),
    # Llama as Meta wrote it
    "layers/0/attention/wo/weight": None,
    "layers/0/feed_forward/w1/weight": None,
    "tok_embeddings.weight": EMBEDDING.format("tok_embeddings"),
    "output.weight": HEAD.format("output"),
    "output/weight": HEAD.format("output"),
    "layers/attention_norm/weight": NORM.format("attention_norm"),
    # MaxText
    "params/decoder/layers/self_attention/out/kernel": None,
    "params/decoder/layers/mlp/wi_0/kernel": None,
    "params/token_embedder/embedding": EMBEDDING.format("token_embedder"),
    "params/decoder/logits_dense/kernel": HEAD.format("logits_dense"),
    "params/decoder/decoder_norm/scale": NORM.format("scale"),
    "params/decoder/layers/pre_self_attention_layer_norm/scale": NORM.format("scale"),
    # Tunix, Gemma
    "layers/0/attn/attn_vec_einsum/w": None,
    "transformer/layer_0/attn/q_einsum/w": None,
    "embedder/input_embedding": EMBEDDING.format("embedder"),
    "final_norm/w": NORM.format("final_norm"),
    # TransformerLens
    "blocks/0/attn/W_Q": None,
    "blocks/0/mlp/W_out": None,
    "embed/W_E": EMBEDDING.format("embed"),
    "W_E": EMBEDDING.format("W_E"),
    "W_pos": EMBEDDING.format("W_pos"),
    "W_U": HEAD.format("W_U"),
    "unembed/W_U": HEAD.format("unembed"),
    "blocks/0/attn/b_Q": NORM.format("b_Q"),
    # Haiku, Keras
    "transformer/~/linear_1/w": None,
    "transformer/layer_norm/w": NORM.format("layer_norm"),
    "lm/~/embed/embeddings": EMBEDDING.format("embed"),
    "layer_normalization_1/gamma": NORM.format("layer_normalization_1"),
    # Equinox, nanoGPT, x-transformers
    ".blocks[0].mlp.layers[1].weight": None,
    "layers/PreNorm_0/fn/to_qkv": None,
    "net/layers/0/PreNorm_1/fn/net/0/weight": None,
    "token_emb/emb/weight": EMBEDDING.format("emb"),
    "tok_emb/weight": EMBEDDING.format("tok_emb"),
    "['tok_emb']": EMBEDDING.format("tok_emb"),
    "to_logits/weight": HEAD.format("to_logits"),
    # Diffusion: U-Nets, transformers; flows
    "down_blocks_0/resnets_1/time_emb_proj/kernel": None,
    "time_embedding/linear_1/kernel": None,
    "transformer_blocks_0/norm1/linear/kernel": None,
    "down_blocks_0/attentions_0/proj_out/kernel": None,
    "blocks/0/adaLN_modulation/weight": None,
    "proj_out/kernel": HEAD.format("proj_out"),
    "NormalizingFlow_0/Dense_0/kernel": None,
    "ScoreNet_0/Dense_0/kernel": None,
    # Words and parts of words, inside of a block and outside
    "w": None,
    "": None,
    "enormous/kernel": None,
    "Classifier_0/encoder/Dense_0/kernel": None,
    "head/mlp/fc1/kernel": None,
    "out/2/weight": HEAD.format("out"),
    "PreNorm_0/value/weight": None,
    "PreNorm_0/weight/value": NORM.format("PreNorm_0"),
    "norm/kernel": None,
    "rescale_free/kernel": None,
    "unbiased/kernel": None,
    "members/kernel": None,
    "head_proj/kernel": None,
    "out_proj/kernel": None,
    "heads/kernel": None,
    "multi_head_attention/w": None,
    "attention/out": None,
    "mlp/out": None,
    "moe/shared/w": None,
    "layers/classifier/w": None,
    "layers/output_layer/w": None,
    "transformer/output_layer/weight": HEAD.format("output_layer"),
    "params/model/out/kernel": HEAD.format("out"),
    "embed/table": EMBEDDING.format("embed"),
    "layers/scale": NORM.format("scale"),
    "layers/query_bias": NORM.format("query_bias"),
    "layers/q_norm": NORM.format("q_norm"),
    "ln_f": NORM.format("ln_f"),
    "norm/0": NORM.format("norm"),
}


@pytest.mark.parametrize("path", NAMES)
def test_names(path):
    assert exemption(path, (32, 64)) == NAMES[path]


@pytest.mark.parametrize("path", ["ln/weight", "norm", "layers/bias"])
@pytest.mark.parametrize(
    "shape, matrix",
    [((32, 4096), False), ((4096, 32), False), ((1024, 4096), True), ((2, 1024, 1024), True),
     ((1024, 4, 1024), False), ((4096,), False)],
)  # fmt: skip
def test_shapes_tell_a_matrix_from_a_stack_of_vectors(path, shape, matrix):
    assert (exemption(path, shape) is None) == matrix


def test_the_reason_is_told_and_can_be_overruled():
    params = {path or "one": zeros(32, 64) for path in NAMES}
    told = {plan.path: plan.reason for plan in plans(params)}
    assert told == {path or "one": reason or "projected" for path, reason in NAMES.items()}
    assert all(plan.is_projected for plan in plans(params, targets=gj.all_matrices))
    quantized = gj.quant.quantize_params({path: jnp.zeros((32, 64)) for path in ("w", "wte")})
    assert isinstance(quantized["wte"], jax.Array) and not isinstance(quantized["w"], jax.Array)


def zeros(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def plans(params, rank=2, targets=None):
    return gj.views.leaf_plan(Rules(rank, "short", None, targets_rule(targets)), params)


def projected(params, targets=None):
    return [plan.path for plan in plans(params, targets=targets) if plan.is_projected]


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
        (["attn", "mlp"], ["layers/attn/q", "layers/mlp"]),
        (("mlp", "nothing"), ["layers/mlp"]),
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


def test_what_targets_do_not_take():
    reasons = {p.path: (p.reason, p.is_matrix) for p in plans(PARAMS, targets=["attn"])}
    assert reasons["embed"] == ("not in targets", False)
    assert reasons["layers/attn/q"] == ("projected", True)
    assert reasons["layers/attn/bias"] == ("fewer than two axes", False)


def test_a_list_is_kept_as_a_tuple():
    assert targets_rule(["a", "b"]) == targets_rule(("a", "b")) == ("a", "b")
    assert targets_rule(gj.all_matrices) is gj.all_matrices


@pytest.mark.parametrize("targets", [3, b"attn", [], (), ["attn", 3], [gj.all_matrices], {"a": 1}])
def test_wrong_kind(targets):
    with pytest.raises(TypeError, match="regex"):
        gj.low_rank_projection(optax.identity(), 2, targets=targets)


@pytest.mark.parametrize("targets", ["(attn", ["mlp", "(attn"]])
def test_bad_regex(targets):
    with pytest.raises(ValueError, match=r"'\(attn'"):
        gj.low_rank_projection(optax.identity(), 2, targets=targets)
