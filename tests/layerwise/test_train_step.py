"""Layer by layer, the numbers are those of an ordinary step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stacked_model as sm

import galore_jax as gj
from examples.llama import model as llama
from examples.llama import objective
from galore_jax import layerwise

# optax' Adam corrects its bias by float ** int32.
pytestmark = pytest.mark.standard_promotion

STEPS = 20
LENS = {"rank": 4, "axes": gj.MatrixAxes(-2, -1)}
OFTEN = LENS | {"update_proj_gap": 6}
FULL_RANK = optax.adamw(3e-3, weight_decay=0.1)
ALIASES = {
    "galore": gj.galore(1e-2, **OFTEN),
    "galore_adamw": gj.galore_adamw(1e-2, weight_decay=0.1, **OFTEN),
    "galore_adafactor": gj.galore_adafactor(1e-2, clipping_threshold=None, **OFTEN),
    "galore_lion": gj.galore_lion(1e-3, **OFTEN),
    "galore_sgd": gj.galore_sgd(1e-1, momentum=0.9, **OFTEN),
    "galore_adamw8bit": gj.galore_adamw8bit(1e-2, **OFTEN),
    "q_galore_adamw8bit": gj.q_galore_adamw8bit(1e-2, **OFTEN),
}


def passing_extra_args(steps):
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


PARTS = {"embed": "full", "blocks": {"up": "low", "down": "full", "norm": "full"},
         "norm": "full", "lm_head": "full"}  # fmt: skip
OTHERS = {
    "long": gj.galore_sgd(1e-1, side="long", **OFTEN),
    "output": gj.galore_sgd(1e-1, side="output", projector=gj.projectors.gram_eigh(), **OFTEN),
    "staggered": gj.galore_adamw(1e-2, update_proj_gap=gj.refresh.staggered(5), **LENS),
    "adaptive": gj.galore_adamw(
        1e-2, update_proj_gap=gj.refresh.adaptive(2, 0.2, patience=1), **LENS),
    "rotate": gj.galore_adamw(1e-2, transport=gj.transport.rotate(), **OFTEN),
    "partition": optax.partition({"low": gj.galore_adamw(1e-2, **OFTEN), "full": FULL_RANK}, PARTS),
    "masked": optax.masked(FULL_RANK, lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
    "injected": optax.inject_hyperparams(gj.galore_adamw, static_args=gj.STATIC_ARGS)(
        optax.linear_schedule(1e-2, 1e-3, STEPS), **OFTEN),
    "accumulated": passing_extra_args(optax.MultiSteps(gj.galore_adamw(1e-2, **OFTEN), 2)),
    "clipped": optax.chain(
        layerwise.clip_by_previous_norm(0.3), gj.galore_sgd(1e-1, momentum=0.9, **OFTEN)),
}  # fmt: skip


def both(tx, params, *, steps=STEPS, key=None, **options):
    """The results of the two ways to train."""
    data, state = sm.batches(steps), tx.init(params)
    expected = sm.run(sm.ordinary_step(tx), params, state, data, key)
    found = sm.run(layerwise.train_step(*sm.MODEL, tx, **options), params, state, data, key)
    assert expected[2][-1] < expected[2][0]  # it learns something
    return found, expected


@pytest.mark.parametrize("name", ["adamw", "galore_adamw", "galore_lion"])
@pytest.mark.sampled(1)
def test_the_same_as_an_ordinary_step_between_refreshes(name):
    rarely = LENS | {"update_proj_gap": STEPS}
    tx = {
        "adamw": FULL_RANK,
        "galore_adamw": gj.galore_adamw(1e-2, **rarely),
        "galore_lion": gj.galore_lion(1e-3, **rarely),
    }[name]
    (params, _, losses), (expected, _, expected_losses) = both(tx, sm.initial())
    assert sm.distance(params, expected) < 1e-6
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)


@pytest.mark.parametrize("name", [*ALIASES, *OTHERS])
@pytest.mark.sampled(4)
def test_the_same_as_an_ordinary_step_across_refreshes(name):
    tx = (ALIASES | OTHERS)[name]
    # The norm that clips is that of the projections, unless gradients are formed.
    options = sm.PULLBACKS["full" if name == "clipped" else "projected"]
    (params, state, _), (expected, expected_state, _) = both(tx, sm.initial(), **options)
    assert sm.distance(params, expected) < 1e-5
    assert sm.signature(state) == sm.signature(expected_state)
    # Counts, plans of refreshes, schedules: everything that decides is equal.
    ours, theirs = sm.by_path(state), sm.by_path(expected_state)
    decisions = [k for k, x in theirs.items() if x.dtype in (np.bool_, np.int32, np.uint32)]
    assert decisions
    for k in decisions:
        np.testing.assert_array_equal(ours[k], theirs[k], err_msg=k)


def test_adaptive_gaps_have_grown():
    """Otherwise the case in the table above would say nothing."""
    tx = OTHERS["adaptive"]
    _, state, _ = sm.run(
        layerwise.train_step(*sm.MODEL, tx), sm.initial(), tx.init(sm.initial()), sm.batches(STEPS)
    )
    gaps = state[0].refresh_state.memory["blocks.up.kernel"].gap
    assert gaps.shape == (sm.LAYERS,) and np.min(gaps) > 2


@pytest.mark.parametrize("name", ["adamw", "galore_adamw"])
@pytest.mark.sampled(1)
def test_in_float64_the_two_agree_to_ten_digits(name):
    with jax.enable_x64(True):
        tx = {
            "adamw": FULL_RANK,
            "galore_adamw": gj.galore_adamw(1e-2, state_dtype="float64", **OFTEN),
        }[name]
        (params, _, losses), (expected, _, expected_losses) = both(tx, sm.initial(jnp.float64))
        assert jax.tree.leaves(params)[0].dtype == jnp.float64
        assert sm.distance(params, expected) < 1e-10
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-10)


def few_bits(**options):
    """INT4 bases and 8-bit moments, also of small matrices."""
    return optax.chain(
        gj.low_rank_projection(
            gj.quantized_state(optax.scale_by_adam(), min_size=64, block=16),
            refresh=6, codec=gj.codecs.int4(block=4), **LENS, **options,
        ),
        optax.scale_by_learning_rate(1e-2),
    )  # fmt: skip


def side_by_side(tx, params, *, steps, pullback=gj.backward.pullback, **options):
    """Pairs of results of single steps, all from the states of the ordinary trajectory."""
    ordinary = jax.jit(sm.ordinary_step(tx), **options)
    by_layer = jax.jit(layerwise.train_step(*sm.MODEL, tx, pullback=pullback), **options)
    state, pairs = tx.init(params), []
    for number, tokens in enumerate(sm.batches(steps)):
        key = jax.random.fold_in(jax.random.key(3), number)
        found, expected = (step(params, state, tokens, key) for step in (by_layer, ordinary))
        np.testing.assert_allclose(found[2].loss, expected[2], atol=1e-5)
        pairs.append((found[:2], expected[:2]))
        params, state, _ = expected
    return pairs


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.sampled(1)
def test_few_bits(weights):
    """All but the same codes; one that tips would tip more of them in the steps after it."""
    params = sm.initial()
    if weights == "int8":
        params = gj.quant.quantize_params(params, block=16)
    differing, total = 0, 0
    for found, expected in side_by_side(few_bits(), params, steps=9):
        assert sm.signature(found) == sm.signature(expected)
        ours, theirs = sm.by_path(found), sm.by_path(expected)
        codes = [k for k, x in theirs.items() if x.dtype == np.uint8 and not k.endswith("zeros")]
        kinds = ["mu", "nu", "projectors"] + (["0/blocks"] if weights == "int8" else [])
        assert all(any(kind in k for k in codes) for kind in kinds)
        for k in codes:
            parts = (ours[k], theirs[k])
            # Two codes of four bits share a byte.
            one, other = (_nibbles(x) if "projectors" in k else x.astype(int) for x in parts)
            assert np.max(np.abs(one - other)) <= 1, k
            differing, total = differing + np.sum(one != other), total + one.size
    assert differing <= 1e-3 * total


def _nibbles(codes):
    return np.stack([codes & 15, codes >> 4]).astype(int)


def test_bfloat16_weights_bit_for_bit():
    """Stochastic rounding included, once the compiler rounds where the program says so."""
    exactly = {"compiler_options": {"xla_allow_excess_precision": False}}
    tx = gj.galore_sgd(1e-1, momentum=0.9, **OFTEN)
    # Of gradients that are formed: a product of two skinny ones rounds elsewhere.
    exactly["pullback"] = sm.plain
    for found, expected in side_by_side(tx, sm.initial(jnp.bfloat16), steps=4, **exactly):
        theirs = sm.by_path(expected[0])
        for path, ours in sm.by_path(found[0]).items():
            assert ours.dtype == jnp.bfloat16
            np.testing.assert_array_equal(ours, theirs[path], err_msg=path)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_every_layer_is_rounded_with_its_own_random_numbers(dtype):
    """Those it has in the stack; which differ although parameters and updates are equal."""
    params = {"blocks": jax.tree.map(
        lambda x: jnp.broadcast_to(x[:1], x.shape), sm.initial()["blocks"])}  # fmt: skip
    if dtype == "int8":
        params = gj.quant.quantize_params(params, block=16)
    else:
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    updates = jax.tree.map(
        lambda x: jnp.full(x.shape, 1e-3, x.dtype), gj.quant.dequantize_params(params)
    )
    apply = jax.jit(functools.partial(gj.apply_updates, key=jax.random.key(5)))
    whole = sm.by_path(apply(params, updates))
    rounded = [k for k, x in whole.items() if x.dtype != np.float32 and x.size > sm.LAYERS]
    for i in range(sm.LAYERS):
        one, update = jax.tree.map(lambda x, i=i: x[i : i + 1], (params, updates))
        for path, ours in sm.by_path(apply(one, update, layer=jnp.int32(i))).items():
            np.testing.assert_array_equal(ours[0], whole[path][i], err_msg=path)
    for path in rounded:
        if "zeros" not in path:
            assert not np.array_equal(whole[path][0], whole[path][1]), path


@pytest.mark.parametrize("first", ["layerwise", "ordinary"])
@pytest.mark.sampled(1)
def test_the_two_can_take_turns(first):
    """The state is the optimizer's own: a checkpoint of one can be continued by the other."""
    tx = optax.chain(
        layerwise.clip_by_previous_norm(0.3),
        gj.galore_adamw(1e-2, update_proj_gap=gj.refresh.staggered(5), **LENS),
    )
    data, params = sm.batches(10), sm.initial()
    by_layer = layerwise.train_step(*sm.MODEL, tx, pullback=sm.plain)
    steps = {"layerwise": by_layer, "ordinary": sm.ordinary_step(tx)}
    second = next(name for name in steps if name != first)
    expected, _, _ = sm.run(steps["ordinary"], params, tx.init(params), data)
    half, state, _ = sm.run(steps[first], params, tx.init(params), data[:5])
    found, _, _ = sm.run(steps[second], half, state, data[5:])
    assert sm.distance(found, expected) < 1e-5


def test_no_retrace():
    tx, traces = gj.galore_adamw(1e-2, **OFTEN), []

    def counted(layer, x):
        traces.append(None)
        return sm.block(layer, x)

    step = jax.jit(layerwise.train_step(sm.embed, counted, sm.head, tx))
    params, state = sm.initial(), tx.init(sm.initial())
    for tokens in sm.batches(3):
        params, state, _ = step(params, state, tokens)
    assert step._cache_size() == 1
    # Forwards, forwards again for the backward pass, and what jit looks at twice.
    assert len(traces) <= 4


def test_metrics_and_aux():
    params, tokens = sm.initial(), sm.batches(1)[0]
    tx = optax.sgd(1e-1)

    def with_aux(params, x, tokens):
        return sm.head(params, x, tokens), {"largest": jnp.max(x), "tokens": jnp.int32(tokens.size)}

    step = layerwise.train_step(sm.embed, sm.block, with_aux, tx, has_aux=True)
    _, _, metrics = jax.jit(step)(params, tx.init(params), tokens)
    value, gradients = jax.value_and_grad(sm.loss_fn)(params, tokens)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(gradients), rtol=1e-6)
    assert metrics.skipped == 0 and metrics.aux["largest"].shape == ()
    assert metrics.aux["tokens"] == tokens.size


def test_tied_embeddings():
    """A parameter that embedding and head share gets both gradients."""
    params = sm.initial()
    del params["lm_head"]
    tx = gj.galore_adamw(1e-2, **OFTEN)

    def tied_head(params, x, tokens):
        return sm.head({**params, "lm_head": {"kernel": params["embed"]["embedding"].T}}, x, tokens)

    def loss(params, tokens):
        x, _ = jax.lax.scan(
            lambda x, layer: (sm.block(layer, x), None), sm.embed(params, tokens), params["blocks"]
        )
        return tied_head(params, x, tokens)

    state, data = tx.init(params), sm.batches(6)
    expected, _, _ = sm.run(sm.ordinary_step(tx, loss), params, state, data)
    step = layerwise.train_step(sm.embed, sm.block, tied_head, tx)
    found, _, _ = sm.run(step, params, state, data)
    assert sm.distance(found, expected) < 1e-6


def test_activations_may_be_a_tree():
    """As a mixture of experts has it, whose balance is added to the loss."""
    tx = optax.sgd(1e-1)

    def embed(params, tokens):
        return sm.embed(params, tokens), jnp.zeros(())

    def block(layer, x):
        x, penalty = x
        return sm.block(layer, x), penalty + jnp.mean(layer["up"]["kernel"] ** 2)

    def head(params, x, tokens):
        x, penalty = x
        return sm.head(params, x, tokens) + penalty

    def loss(params, tokens):
        x, _ = jax.lax.scan(
            lambda x, layer: (block(layer, x), None), embed(params, tokens), params["blocks"]
        )
        return head(params, x, tokens)

    params, data = sm.initial(), sm.batches(4)
    expected, _, _ = sm.run(sm.ordinary_step(tx, loss), params, tx.init(params), data)
    step = layerwise.train_step(embed, block, head, tx)
    found, _, _ = sm.run(step, params, tx.init(params), data)
    assert sm.distance(found, expected) < 1e-6


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.sampled(1)
def test_the_llama_example(quantized):
    config = llama.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=40, num_layers=3, num_heads=2,
        max_seq_len=16,
    )  # fmt: skip
    params = llama.init(config, jax.random.key(0))
    if quantized:
        params = gj.quant.quantize_params(params, block=16)
    tx = gj.galore_adamw(1e-2, **OFTEN)
    rng = np.random.default_rng(2)
    data = [
        {k: jnp.asarray(rng.integers(32, size=(2, 16)), jnp.int32) for k in ("inputs", "targets")}
        for _ in range(8)
    ]
    state, key = tx.init(params), jax.random.key(1)
    expected = sm.run(
        sm.ordinary_step(tx, functools.partial(objective.loss, config)), params, state, data, key
    )
    step = layerwise.train_step(
        lambda params, batch: llama.embed(config, params, batch["inputs"]),
        functools.partial(llama.block, config),
        lambda params, x, batch: objective.cross_entropy(
            llama.head(config, params, x), batch["targets"]
        ),
        tx,
    )
    found = sm.run(step, params, state, data, key)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5)
    decoded = [gj.quant.dequantize_params(result[0]) for result in (found, expected)]
    assert sm.distance(*decoded) < (1e-3 if quantized else 1e-5)
