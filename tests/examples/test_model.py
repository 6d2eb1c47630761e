"""The example Llama: against an independent forward pass, and as a host for exotic kernels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama import model, objective
from examples.llama.model import LlamaConfig
from examples.llama.presets import PRESETS

TINY = LlamaConfig(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    max_seq_len=16,
    init_std=0.2,  # large enough for every layer to matter
)
KERNELS = [
    ("blocks", "attn", "q"),
    ("blocks", "attn", "k"),
    ("blocks", "attn", "v"),
    ("blocks", "attn", "o"),
    ("blocks", "mlp", "gate"),
    ("blocks", "mlp", "up"),
    ("blocks", "mlp", "down"),
    ("lm_head",),
]


@functools.cache
def tiny_params():
    return jax.jit(functools.partial(model.init, TINY))(jax.random.key(0))


@functools.cache
def compiled(name, config=TINY):
    function = getattr(objective if name == "loss" else model, name)
    if name == "loss":
        function = jax.value_and_grad(function, argnums=1)
    return jax.jit(functools.partial(function, config))


def tiny_batch(seed=0, shape=(2, 9)):
    tokens = np.random.default_rng(seed).integers(0, TINY.vocab_size, (shape[0], shape[1] + 1))
    tokens = tokens.astype(np.int32)
    return {"inputs": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:])}


def shapes_by_path(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def assert_trees_close(got, want, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


# An independent forward pass: float64, loops over layers, heads and positions, complex rotations.


def numpy_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + TINY.rms_norm_eps) * scale


def numpy_rope(x):
    positions, size = x.shape
    turned = np.empty_like(x)
    for i in range(size // 2):
        angle = np.arange(positions) * TINY.rope_theta ** (-2 * i / size)
        pair = (x[:, i] + 1j * x[:, i + size // 2]) * np.exp(1j * angle)
        turned[:, i], turned[:, i + size // 2] = pair.real, pair.imag
    return turned


def numpy_attention(x, weights):
    q, k, v = (x @ weights[name]["kernel"] for name in "qkv")
    mixed = np.zeros_like(x)
    size = TINY.hidden_size // TINY.num_heads
    for head in range(TINY.num_heads):
        part = slice(head * size, (head + 1) * size)
        queries, keys = numpy_rope(q[:, part]), numpy_rope(k[:, part])
        for t in range(len(x)):
            scores = np.exp(keys[: t + 1] @ queries[t] / np.sqrt(size))
            mixed[t, part] = scores @ v[: t + 1, part] / scores.sum()
    return mixed @ weights["o"]["kernel"]


def numpy_mlp(x, weights):
    gate = x @ weights["gate"]["kernel"]
    return (gate / (1 + np.exp(-gate)) * (x @ weights["up"]["kernel"])) @ weights["down"]["kernel"]


def numpy_logits(params, tokens):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = params["embed"]["embedding"][tokens]
    for i in range(TINY.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        x = x + numpy_attention(numpy_norm(x, layer["attn_norm"]["scale"]), layer["attn"])
        x = x + numpy_mlp(numpy_norm(x, layer["mlp_norm"]["scale"]), layer["mlp"])
    return numpy_norm(x, params["norm"]["scale"]) @ params["lm_head"]["kernel"]


def random_scales(params):
    """Norm scales other than one, so that a test can see them."""
    rng = np.random.default_rng(5)
    return jax.tree.map(
        lambda leaf: (
            jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
            if np.all(leaf == 1)
            else leaf
        ),
        params,
    )


def test_forward_agrees_with_numpy():
    params, batch = random_scales(tiny_params()), tiny_batch()
    got = compiled("apply")(params, batch["inputs"])
    want = np.stack([numpy_logits(params, row) for row in np.asarray(batch["inputs"])])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_loss_agrees_with_numpy_and_honours_weights():
    params, batch = tiny_params(), tiny_batch()
    logits = np.stack([numpy_logits(params, row) for row in np.asarray(batch["inputs"])])
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_probs, np.asarray(batch["targets"])[..., None], -1)[..., 0]
    np.testing.assert_allclose(compiled("loss")(params, batch)[0], nats.mean(), rtol=1e-5)
    weights = np.random.default_rng(1).uniform(size=nats.shape).astype(np.float32)
    weights[:, -3:] = 0
    weighted, _ = compiled("loss")(params, {**batch, "weights": weights})
    np.testing.assert_allclose(weighted, np.average(nats, weights=weights), rtol=1e-5)
    nothing, gradients = compiled("loss")(params, {**batch, "weights": np.zeros_like(weights)})
    assert nothing == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_gradients_agree_with_finite_differences():
    params, batch = random_scales(tiny_params()), tiny_batch()
    _, gradients = compiled("loss")(params, batch)
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)

    def numpy_loss(step):
        moved = jax.tree.map(lambda p, d: np.asarray(p, np.float64) + step * d, params, direction)
        total = []
        for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
            logits = numpy_logits(moved, np.asarray(inputs))
            picked = logits[np.arange(len(logits)), np.asarray(targets)]
            total.append(np.log(np.exp(logits).sum(-1)) - picked)
        return np.mean(total)

    want = (numpy_loss(1e-5) - numpy_loss(-1e-5)) / 2e-5
    products = jax.tree.map(
        lambda g, d: np.sum(np.asarray(g, np.float64) * d), gradients, direction
    )
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), want, rtol=1e-4)


def test_every_parameter_gets_a_gradient():
    _, gradients = compiled("loss")(tiny_params(), tiny_batch())
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.any(leaf), path


def test_remat_changes_nothing():
    params, batch = tiny_params(), tiny_batch()
    config = dataclasses.replace(TINY, remat=True)
    plain, remat = compiled("loss")(params, batch), compiled("loss", config)(params, batch)
    assert_trees_close(remat, plain, rtol=1e-5, atol=1e-6)
    jaxpr = str(jax.make_jaxpr(functools.partial(objective.loss, config))(params, batch))
    assert "checkpoint" in jaxpr or "remat" in jaxpr


def test_apply_is_embed_blocks_head():
    params, tokens = tiny_params(), tiny_batch()["inputs"]
    x = compiled("embed")({"embed": params["embed"]}, tokens)
    for i in range(TINY.num_layers):
        x = compiled("block")(jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]), x)
    logits = compiled("head")({name: params[name] for name in ("norm", "lm_head")}, x)
    want = compiled("apply")(params, tokens)
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-5)


def test_later_tokens_do_not_change_earlier_logits():
    params, tokens = tiny_params(), tiny_batch()["inputs"]
    apply = functools.partial(compiled("apply"), params)
    logits = apply(tokens)
    for at in range(tokens.shape[1]):
        changed = tokens.at[:, at].set((tokens[:, at] + 1) % TINY.vocab_size)
        np.testing.assert_array_equal(apply(changed)[:, :at], logits[:, :at])
        assert np.all(np.any(apply(changed)[:, at] != logits[:, at], axis=-1))


def test_parameter_tree():
    width, inner, layers, vocab = 24, 40, 3, 37
    assert shapes_by_path(tiny_params()) == {
        "embed/embedding": (vocab, width),
        **{f"blocks/attn/{name}/kernel": (layers, width, width) for name in "qkvo"},
        "blocks/mlp/gate/kernel": (layers, width, inner),
        "blocks/mlp/up/kernel": (layers, width, inner),
        "blocks/mlp/down/kernel": (layers, inner, width),
        "blocks/attn_norm/scale": (layers, width),
        "blocks/mlp_norm/scale": (layers, width),
        "norm/scale": (width,),
        "lm_head/kernel": (width, vocab),
    }
    nodes = [tiny_params()]
    while nodes:
        node = nodes.pop()
        assert type(node) in (dict, type(jnp.ones(1)))
        nodes += node.values() if isinstance(node, dict) else []


def test_init_draws_normal_matrices_and_unit_scales():
    config = dataclasses.replace(PRESETS["tiny"].model, vocab_size=512)
    init = jax.jit(functools.partial(model.init, config))
    params = init(jax.random.key(1))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "scale":
            assert np.all(np.asarray(leaf) == 1)
        else:
            assert abs(np.std(leaf) - 0.02) < 0.0004, path
            assert abs(np.mean(leaf)) < 0.0004, path
    query = np.asarray(params["blocks"]["attn"]["q"]["kernel"])
    assert not np.any(query[0] == query[1])
    assert not np.any(query == np.asarray(params["blocks"]["attn"]["k"]["kernel"]))
    jax.tree.map(np.testing.assert_array_equal, init(jax.random.key(1)), params)


@pytest.mark.parametrize(
    ("name", "total", "projected"),
    [
        ("60m", 58.07, 25.30),
        ("130m", 134.11, 84.93),
        ("350m", 367.97, 302.38),
        ("1b", 1339.08, 1207.91),
        ("7b", 6738.42, 6476.01),
    ],
)
def test_presets_have_the_published_numbers_of_parameters(name, total, projected):
    config = PRESETS[name].model
    shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    blocks = {key: shapes["blocks"][key] for key in ("attn", "mlp")}
    assert round(model.num_params(config) / 1e6, 2) == total
    assert round(sum(leaf.size for leaf in jax.tree.leaves(blocks)) / 1e6, 2) == projected


def test_other_presets():
    assert model.num_params(PRESETS["3b"].model) == 2 * 32_000 * 2560 + 2560 + 32 * (
        4 * 2560**2 + 3 * 2560 * 6848 + 2 * 2560
    )
    assert model.num_params(PRESETS["tiny"].model) == 2 * 4096 * 192 + 192 + 4 * (
        4 * 192**2 + 3 * 192 * 512 + 2 * 192
    )
    for name, preset in PRESETS.items():
        assert preset.seq_len <= preset.model.max_seq_len
        assert preset.warmup_steps == preset.steps // 10
        assert preset.rank < preset.model.hidden_size
        assert preset.scale == 0.25
        assert name == "tiny" or preset.batch_size * preset.seq_len == 131_072


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_dtypes(param_dtype):
    config = dataclasses.replace(TINY, dtype="bfloat16", param_dtype=param_dtype)
    params = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    batch = tiny_batch()
    logits = jax.eval_shape(functools.partial(model.apply, config), params, batch["inputs"])
    assert logits.dtype == jnp.bfloat16
    step = jax.value_and_grad(functools.partial(objective.loss, config))
    loss, gradients = jax.eval_shape(step, params, batch)
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(param_dtype)}


def test_bfloat16_is_close_to_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    loss = jax.jit(functools.partial(objective.loss, config))(tiny_params(), tiny_batch())
    np.testing.assert_allclose(loss, compiled("loss")(tiny_params(), tiny_batch())[0], rtol=0.02)


def test_strict_promotion():
    # In float32 only: jax.nn's attention itself mixes dtypes in bfloat16.
    config = dataclasses.replace(TINY, param_dtype="bfloat16")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_params())
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(jax.grad(functools.partial(objective.loss, config)), params, tiny_batch())


# Kernels that are not arrays: what INT8 weights and the projected backward put in their place.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halved:
    """Stands for a kernel twice its value. It has no shape, no dtype and no arithmetic."""

    value: jax.Array
    tag: str = dataclasses.field(metadata={"static": True}, default="intact")


def with_halved(params, path):
    *parents, last = path
    changed = dict(params)
    node = changed
    for name in parents:
        node[name] = dict(node[name])
        node = node[name]
    kernel = node[last]["kernel"]
    node[last] = {"kernel": Halved(jax.tree.map(lambda leaf: leaf / 2, kernel))}
    return changed


def spy_on_linear(monkeypatch):
    seen = []
    array_linear = model.linear

    def linear(x, w):
        if isinstance(w, Halved):
            assert w.tag == "intact"
            assert w.value.ndim == 2  # one layer's slice of the stack
            seen.append(w.value.shape)
            w = w.value * 2
        return array_linear(x, w)

    monkeypatch.setattr(model, "linear", linear)
    return seen


def at(tree, path):
    return functools.reduce(lambda node, name: node[name], path, tree)["kernel"]


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("path", KERNELS, ids="/".join)
def test_any_kernel_may_be_a_custom_pytree_node(monkeypatch, path, remat):
    config = dataclasses.replace(TINY, remat=remat)
    seen = spy_on_linear(monkeypatch)
    gradient = jax.grad(functools.partial(objective.loss, config))
    params = with_halved(tiny_params(), path)
    gradients = jax.eval_shape(gradient, params, tiny_batch())
    assert set(seen) == {at(tiny_params(), path).shape[-2:]}
    assert isinstance(at(gradients, path), Halved)
    assert jax.tree.structure(gradients) == jax.tree.structure(params)


@pytest.mark.parametrize("remat", [False, True])
def test_all_kernels_may_be_custom_pytree_nodes(monkeypatch, remat):
    config = dataclasses.replace(TINY, remat=remat)
    params, batch = tiny_params(), tiny_batch()
    want, want_gradients = compiled("loss", config)(params, batch)
    seen = spy_on_linear(monkeypatch)
    for path in KERNELS:
        params = with_halved(params, path)
    step = jax.jit(jax.value_and_grad(functools.partial(objective.loss, config)))
    loss, gradients = step(params, batch)
    assert set(seen) == {at(tiny_params(), path).shape[-2:] for path in KERNELS}
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for path in KERNELS:
        got, expected = at(gradients, path).value, at(want_gradients, path) * 2
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-6)


def test_each_kernel_is_multiplied_by_linear_once(monkeypatch):
    seen = spy_on_linear(monkeypatch)
    params = functools.reduce(with_halved, KERNELS, tiny_params())
    jax.eval_shape(functools.partial(model.apply, TINY), params, tiny_batch()["inputs"])
    assert len(seen) == len(KERNELS)


def test_modules_do_not_check_shapes(monkeypatch):
    """A kernel may be stored in any layout that ``linear`` understands."""
    params, tokens = tiny_params(), tiny_batch()["inputs"]
    want = compiled("apply")(params, tokens)
    transposed = {
        **params,
        "blocks": jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.swapaxes(leaf, -1, -2) if path[-1].key == "kernel" else leaf,
            params["blocks"],
        ),
        "lm_head": {"kernel": params["lm_head"]["kernel"].T},
    }
    monkeypatch.setattr(model, "linear", lambda x, w: x @ w.T)
    got = jax.jit(functools.partial(model.apply, TINY))(transposed, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# Refusals.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("hidden_size", 25),  # 4 heads
        ("hidden_size", 12),  # heads of 3 features
        ("intermediate_size", 1.5),
        ("num_layers", -1),
        ("num_heads", True),
        ("max_seq_len", "16"),
        ("rms_norm_eps", 0.0),
        ("rope_theta", float("nan")),
        ("init_std", -0.02),
        ("dtype", "int32"),
        ("param_dtype", "float33"),
        ("attention", "flash"),
    ],
)
def test_impossible_models_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(TINY, **{field: value})


def test_equal_configurations_are_equal():
    spelt = [dataclasses.replace(TINY, dtype=d) for d in ("bfloat16", jnp.bfloat16)]
    assert spelt[0] == spelt[1]
    assert hash(spelt[0]) == hash(spelt[1])


def test_too_long_sequences_are_refused():
    with pytest.raises(ValueError, match="17 exceeds max_seq_len 16"):
        model.apply(TINY, tiny_params(), jnp.zeros((1, 17), jnp.int32))
