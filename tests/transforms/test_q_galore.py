"""Q-GaLore as a whole: INT8 weights, INT4 bases, 8-bit moments, adaptive refreshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj
from galore_jax.quant import QuantizedArray

# optax' Adam corrects its bias by float ** int32, and its schedules do such things too.
pytestmark = pytest.mark.standard_promotion

VOCAB, WIDTH, HIDDEN, LAYERS, RANK = 32, 32, 160, 2, 32
ALIAS = functools.partial(
    gj.q_galore_adamw8bit, rank=RANK // 2, axes=gj.MatrixAxes(-2, -1), scale=1.0,
    update_proj_gap=gj.refresh.adaptive(3, patience=1),
)  # fmt: skip


def initial(dtype=jnp.float32):
    """Every kind of leaf: stacked kernels, embedding, head, norm scales, a bias."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), dtype)

    return {
        "embed": {"embedding": draw(VOCAB, WIDTH)},
        "layers": {
            "up": {
                "kernel": draw(LAYERS, WIDTH, HIDDEN),
                "bias": jnp.zeros((LAYERS, HIDDEN), dtype),
            },
            "down": {"kernel": draw(LAYERS, HIDDEN, WIDTH)},
            "norm": {"scale": jnp.ones((LAYERS, WIDTH), dtype)},
        },
        "final_norm": {"scale": jnp.ones(WIDTH, dtype)},
        "lm_head": {"kernel": draw(WIDTH, VOCAB)},
    }  # fmt: skip


def loss_fn(params, tokens):
    """A chain of tokens from one to the next, through two blocks under scan."""

    def normed(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale

    def block(x, layer):
        h = gj.matmul(normed(x, layer["norm"]["scale"]), layer["up"]["kernel"])
        h = jax.nn.relu(h + layer["up"]["bias"])
        return x + gj.matmul(h, layer["down"]["kernel"]), None

    x = params["embed"]["embedding"][tokens[:-1]]
    x, _ = jax.lax.scan(block, x, params["layers"])
    x = normed(x, params["final_norm"]["scale"])
    logits = gj.matmul(x, params["lm_head"]["kernel"]).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]))


def batches(count):
    rng = np.random.default_rng(1)
    after = rng.permutation(VOCAB)
    for _ in range(count):
        chain = [int(rng.integers(VOCAB))]
        for _ in range(64):
            chain.append(int(after[chain[-1]]) if rng.uniform() < 0.9 else int(rng.integers(VOCAB)))
        yield jnp.asarray(chain, jnp.int32)


@functools.cache
def make_step(tx, stochastic):
    @jax.jit
    def step(params, state, tokens, number):
        loss, grads = gj.quant.value_and_grad(loss_fn)(params, tokens)
        updates, state = tx.update(grads, state, params)
        key = jax.random.fold_in(jax.random.key(0), number) if stochastic else None
        return loss, gj.apply_updates(params, updates, key=key), state

    return step


def train(tx, params, steps, *, stochastic=True):
    """Losses, and the parameters and the state at the end."""
    step, state, losses = make_step(tx, stochastic), jax.jit(tx.init)(params), []
    for number, tokens in enumerate(batches(steps)):
        loss, params, state = step(params, state, tokens, number)
        losses.append(float(loss))
    assert step._cache_size() == 1
    return losses, params, state


def by_path(tree):
    is_leaf = lambda node: isinstance(node, QuantizedArray)  # noqa: E731
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


KERNELS = {"layers/up/kernel", "layers/down/kernel"}


@pytest.fixture(scope="module")
def trained():
    with jax.numpy_dtype_promotion("standard"):
        params = gj.quant.quantize_params(initial())
        tx = ALIAS(optax.linear_schedule(3e-2, 3e-3, 40))
        return params, *train(tx, params, 40)


def test_the_loss_falls_about_as_far_as_in_full_precision(trained):
    _, losses, _, _ = trained
    exact, _, _ = train(
        gj.galore_adamw(
            optax.linear_schedule(3e-2, 3e-3, 40), RANK // 2, axes=gj.MatrixAxes(-2, -1),
            scale=1.0, update_proj_gap=3,
        ),
        initial(), 40,
    )  # fmt: skip
    fallen, exact_fall = (np.mean(x[:3]) - np.mean(x[-5:]) for x in (losses, exact))
    assert exact_fall > 1.0
    assert fallen > 0.9 * exact_fall


def test_every_leaf_moves(trained):
    """Embedding, head, norms and biases included: the released code freezes some of them."""
    before, _, after, _ = trained
    for path, leaf in by_path(after).items():
        old = by_path(before)[path]
        assert isinstance(leaf, QuantizedArray) == isinstance(old, QuantizedArray)
        assert isinstance(leaf, QuantizedArray) == (path in KERNELS), path
        one, other = (np.asarray(gj.quant.dequantize(x)) for x in (old, leaf))
        assert np.mean(one != other) > 0.5, path
        assert np.linalg.norm(one - other) > 0.01 * np.sqrt(one.size) * 0.1, path
        assert np.all(np.isfinite(other)), path
    assert jax.tree.structure(after) == jax.tree.structure(before)


def test_what_is_stored_in_what(trained):
    *_, state = trained
    lens = state[0]
    assert isinstance(lens.config.codec, gj.codecs.int4)
    for path, basis in by_path(lens.projectors).items():
        assert isinstance(basis, QuantizedArray) == (path in KERNELS)
        if path in KERNELS:
            assert basis.bits == 4 and basis.shape == (LAYERS, WIDTH, RANK // 2)
    # [2, 160, 16] entries are above the least size of 4096; the other leaves are below it.
    for moments in (lens.inner_state.mu, lens.inner_state.nu):
        assert moments["layers"]["up"]["kernel"].codes.dtype == jnp.uint8
        assert moments["layers"]["down"]["kernel"].codes.shape == (LAYERS, HIDDEN, RANK // 2)
        assert moments["layers"]["up"]["bias"].dtype == jnp.float32
    refreshes = lens.refresh_state.refreshes["layers.up.kernel"]
    assert refreshes.shape == (LAYERS,) and np.all(np.asarray(refreshes) >= 2)


def test_describe_reads_it():
    params = gj.quant.quantize_params(initial())
    table = gj.describe(ALIAS(1e-2), params)
    rows = {row.path: row for row in table.rows}
    assert {path for path, row in rows.items() if row.projected} == KERNELS
    up = rows["layers/up/kernel"]
    assert up.shape == (LAYERS, WIDTH, HIDDEN) and up.rank == RANK // 2
    entries = LAYERS * HIDDEN * RANK // 2
    wide = gj.describe(gj.galore_adamw(1e-2, RANK // 2, axes=gj.MatrixAxes(-2, -1)), initial())
    exact = {row.path: row for row in wide.rows}["layers/up/kernel"].state_bytes
    assert 2 * entries < up.state_bytes < 0.35 * exact
    assert "layers/up/kernel" in str(table)


def test_weight_decay_reaches_int8_weights():
    params = gj.quant.quantize_params(initial())
    rate, decay = 0.1, 0.2
    mask = jax.tree.map(lambda leaf: leaf.ndim > 1, initial())
    tx = ALIAS(rate, weight_decay=decay, mask=mask)
    state = jax.jit(tx.init)(params)
    zeros = jax.tree.map(jnp.zeros_like, initial())
    updates, _ = jax.jit(tx.update)(zeros, state, params)
    for path, update in by_path(updates).items():
        weight = np.asarray(gj.quant.dequantize(by_path(params)[path]))
        expected = -rate * decay * weight if by_path(mask)[path] else 0 * weight
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-8, err_msg=path)
    shrunk = params
    for number in range(20):
        updates, state = jax.jit(tx.update)(zeros, state, shrunk)
        shrunk = gj.apply_updates(shrunk, updates, key=jax.random.key(number))
    for path in KERNELS:
        before, after = (
            np.asarray(gj.quant.dequantize(by_path(x)[path]), np.float64) for x in (params, shrunk)
        )
        share = np.sum(before * after) / np.sum(before * before)
        assert share == pytest.approx((1 - rate * decay) ** 20, rel=5e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_leaves_every_bit_of_the_weights(bad):
    tx = optax.apply_if_finite(ALIAS(1e-2, weight_decay=0.1), 10)
    params = gj.quant.quantize_params(initial(), bits=8) | {
        "half": jnp.asarray(np.random.default_rng(2).normal(size=100), jnp.bfloat16)
    }
    grads = jax.tree.map(
        lambda x: jnp.ones(x.shape, x.dtype),
        params,
        is_leaf=lambda x: isinstance(x, QuantizedArray),
    )
    spoiled = jax.tree.map(lambda g: g, grads)
    spoiled["final_norm"]["scale"] = spoiled["final_norm"]["scale"].at[0].set(bad)

    @jax.jit
    def step(params, state, grads, key):
        updates, state = tx.update(grads, state, params)
        return gj.apply_updates(params, updates, key=key), state

    state = jax.jit(tx.init)(params)
    params, state = step(params, state, grads, jax.random.key(0))
    after, skipped = step(params, state, spoiled, jax.random.key(1))
    assert_same_bits(after, params)
    assert_same_bits(skipped.inner_state, state.inner_state)
    assert int(skipped.total_notfinite) == 1
    moved, _ = step(after, skipped, grads, jax.random.key(2))
    assert not np.array_equal(
        moved["layers"]["up"]["kernel"].codes, params["layers"]["up"]["kernel"].codes
    )


def test_without_stochastic_rounding_small_updates_are_lost():
    """Ten steps at a rate at which no entry gets half a step of the codes further."""
    params = gj.quant.quantize_params(initial())
    _, nearest, _ = train(ALIAS(1e-6), params, 10, stochastic=False)
    _, stochastic, _ = train(ALIAS(1e-6), params, 10)
    for path in KERNELS:
        old, same, new = (by_path(tree)[path] for tree in (params, nearest, stochastic))
        assert np.array_equal(same.codes, old.codes)
        assert not np.array_equal(new.codes, old.codes)


def test_a_run_repeats_itself_bit_for_bit():
    params = gj.quant.quantize_params(initial(jnp.bfloat16))
    tx = ALIAS(1e-2)
    one, other = (train(tx, params, 4)[1:] for _ in range(2))
    assert_same_bits(one, other)
    assert {leaf.dtype for leaf in jax.tree.leaves(gj.quant.dequantize_params(one[0]))} == {
        jnp.dtype(jnp.bfloat16)
    }


@pytest.mark.parametrize("alias", [gj.galore_adamw8bit, gj.q_galore_adamw8bit])
def test_numbers_can_be_injected(alias):
    inject = optax.inject_hyperparams(alias, static_args=gj.STATIC_ARGS)
    numbers = {"learning_rate": 0.1, "scale": 0.5, "weight_decay": 0.01, "b2": 0.99}
    options = {"rank": 8, "update_proj_gap": 2, "projector": gj.projectors.svd()}
    params = {"up": initial()["lm_head"]["kernel"]}
    grads = jax.tree.map(jnp.sin, params)
    updates = []
    for tx in (inject(**numbers, **options), alias(**numbers, **options)):
        update, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
        updates.append(update["up"])
    np.testing.assert_allclose(*updates, atol=1e-5)


def test_galore_adamw8bit_has_bf16_bases_and_fixed_gaps():
    tx = gj.galore_adamw8bit(1e-2, RANK // 2, axes=gj.MatrixAxes(-2, -1), update_proj_gap=7)
    lens = jax.eval_shape(tx.init, gj.quant.quantize_params(initial()))[0]
    assert lens.config.refresh == gj.refresh.every(7)
    assert lens.projectors["layers"]["up"]["kernel"].dtype == jnp.bfloat16
    assert lens.inner_state.nu["layers"]["up"]["kernel"].codes.dtype == jnp.uint8
