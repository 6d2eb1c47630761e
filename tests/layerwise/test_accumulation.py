"""Windows of micro-batches, each micro-batch one block at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stacked_model as sm
from test_layerwise_memory import IN_PLACE, creators, shapes

import galore_jax as gj
from galore_jax import layerwise
from galore_jax.transforms.state import low_rank_states

pytestmark = pytest.mark.standard_promotion

WINDOWS = 20
LENS = {"rank": 4, "axes": gj.MatrixAxes(-2, -1)}
OFTEN = LENS | {"update_proj_gap": 6}


def accumulated_step(tx, pullback):
    """Of a micro-batch, as `gj.accumulate` says: the gradient of everything, then the update."""
    if pullback == "full":
        return sm.ordinary_step(tx)
    value_and_grad = gj.projected_value_and_grad(sm.loss_fn, tx)

    def step(params, opt_state, batch, key=None):
        loss, gradients = value_and_grad(params, opt_state, batch)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return gj.apply_updates(params, updates, key=key), opt_state, loss

    return step


def both(tx, params, every, *, windows=WINDOWS, pullback="full", key=None):
    """The results of the two ways to train."""
    tx, data = gj.accumulate(tx, every), sm.batches(windows * every)
    state = tx.init(params)
    expected = sm.run(accumulated_step(tx, pullback), params, state, data, key)
    step = layerwise.train_step(*sm.MODEL, tx, **sm.PULLBACKS[pullback])
    return sm.run(step, params, state, data, key), expected


def decisions(state):
    return {k: x for k, x in sm.by_path(state).items() if x.dtype in (np.bool_, np.int32)}


@pytest.mark.parametrize("pullback", sm.PULLBACKS)
@pytest.mark.sampled(1)
def test_the_same_as_an_ordinary_step_between_refreshes(pullback):
    tx = gj.galore_adamw(1e-2, weight_decay=0.1, update_proj_gap=WINDOWS, **LENS)
    found, expected = both(tx, sm.initial(), 2, pullback=pullback)
    assert sm.distance(found[0], expected[0]) < 1e-6
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-6)


ACROSS = {
    "every": gj.galore_adamw(1e-2, weight_decay=0.1, **OFTEN),
    "staggered": gj.galore_adamw(1e-2, update_proj_gap=gj.refresh.staggered(5), **LENS),
    "adaptive": gj.galore_adamw(
        1e-2, update_proj_gap=gj.refresh.adaptive(2, 0.2, patience=1), **LENS),
    "rotate": gj.galore_adamw(1e-2, transport=gj.transport.rotate(), **OFTEN),
    "int4 bases": gj.q_galore_adamw8bit(1e-2, **OFTEN),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, pullback",
    [(name, "full") for name in ACROSS] + [("every", "projected"), ("rotate", "projected")],
)
@pytest.mark.sampled(2)
def test_the_same_as_an_ordinary_step_across_refreshes(name, pullback):
    found, expected = both(ACROSS[name], sm.initial(), 3, pullback=pullback)
    assert sm.distance(found[0], expected[0]) < 1e-5
    assert expected[2][-1] < expected[2][0]  # it learns something
    assert sm.signature(found[1]) == sm.signature(expected[1])
    # Counts, windows, plans of refreshes: everything that decides is equal.
    ours, theirs = decisions(found[1]), decisions(expected[1])
    for k in theirs:
        np.testing.assert_array_equal(ours[k], theirs[k], err_msg=k)
    for lens in low_rank_states(expected[1]):
        assert np.min(lens.refresh_state.refreshes["blocks.up.kernel"]) >= 2
        assert lens.count == WINDOWS


@pytest.mark.parametrize("pullback", sm.PULLBACKS)
@pytest.mark.sampled(1)
def test_every_micro_batch_is_clipped_by_itself(pullback):
    """As by a clip in front of the whole; the projected backward shows it projected gradients."""
    tx, limit = gj.accumulate(gj.galore_sgd(1e-1, momentum=0.9, **OFTEN), 2), 0.3
    chained = optax.chain(optax.clip_by_global_norm(limit), tx)
    params, data = sm.initial(), sm.batches(8)
    state = tx.init(params)
    free = sm.run(accumulated_step(tx, pullback), params, state, data)
    if pullback == "full":
        expected = sm.run(accumulated_step(chained, pullback), params, chained.init(params), data)
    else:
        value_and_grad = gj.projected_value_and_grad(sm.loss_fn, tx)

        def step(params, opt_state, batch, key=None):
            loss, gradients = value_and_grad(params, opt_state, batch)
            gradients, _ = optax.clip_by_global_norm(limit).update(gradients, optax.EmptyState())
            updates, opt_state = tx.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        expected = sm.run(step, params, state, data)
    walk = layerwise.train_step(*sm.MODEL, tx, clip_norm=limit, **sm.PULLBACKS[pullback])
    found = sm.run(walk, params, state, data)
    assert sm.distance(found[0], expected[0]) < 1e-5
    assert sm.distance(free[0], expected[0]) > 1e-2


@pytest.mark.parametrize("pullback", sm.PULLBACKS)
@pytest.mark.sampled(1)
def test_in_float64_the_two_agree_to_ten_digits(pullback):
    with jax.enable_x64(True):
        tx = gj.galore_adamw(1e-2, state_dtype="float64", **OFTEN)
        found, expected = both(tx, sm.initial(jnp.float64), 2, pullback=pullback)
        assert jax.tree.leaves(found[0])[0].dtype == jnp.float64
        assert sm.distance(found[0], expected[0]) < 1e-10


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.sampled(1)
def test_few_bits(weights):
    """All but the same codes, from one state; one that tips would tip more of them afterwards."""
    tx = optax.chain(
        gj.low_rank_projection(
            gj.quantized_state(optax.scale_by_adam(), min_size=64, block=16),
            refresh=2, codec=gj.codecs.int4(block=4), **LENS,
        ),
        optax.scale_by_learning_rate(1e-2),
    )  # fmt: skip
    tx, params = gj.accumulate(tx, 2), sm.initial()
    if weights == "int8":
        params = gj.quant.quantize_params(params, block=16)
    by_layer = jax.jit(layerwise.train_step(*sm.MODEL, tx))
    ordinary = jax.jit(sm.ordinary_step(tx))
    state, differing, total, moved = tx.init(params), 0, 0, 0
    for number, tokens in enumerate(sm.batches(10)):
        key = jax.random.fold_in(jax.random.key(3), number)
        found, expected = (step(params, state, tokens, key) for step in (by_layer, ordinary))
        np.testing.assert_allclose(found[2].loss, expected[2], atol=1e-5)
        ours, theirs = sm.by_path(found[:2]), sm.by_path(expected[:2])
        codes = [k for k, x in theirs.items() if x.dtype == np.uint8 and not k.endswith("zeros")]
        kinds = ["mu", "nu", "projectors"] + (["0/blocks"] if weights == "int8" else [])
        assert all(any(kind in k for k in codes) for kind in kinds)
        for k in codes:
            # Two codes of four bits share a byte.
            pair = (ours[k].astype(int), theirs[k].astype(int))
            if "projectors" in k:
                pair = [np.stack([x & 15, x >> 4]) for x in pair]
            assert np.max(np.abs(pair[0] - pair[1])) <= 1, k
            differing, total = differing + np.sum(pair[0] != pair[1]), total + pair[0].size
        params, state, before = *expected[:2], params
        if weights == "int8" and number % 2 == 0:  # inside a window every bit stays
            kernels = zip(*map(jax.tree.leaves, (before, params, found[0])), strict=True)
            assert all(np.array_equal(a, b) and np.array_equal(a, c) for a, b, c in kernels)
        moved += number % 2
    assert moved and differing <= 1e-3 * total


def test_the_two_can_take_turns_inside_a_window():
    tx = gj.accumulate(gj.galore_adamw(1e-2, **LENS, update_proj_gap=2), 3)
    steps = [sm.ordinary_step(tx), layerwise.train_step(*sm.MODEL, tx)]
    steps, params, data = list(map(jax.jit, steps)), sm.initial(), sm.batches(12)
    expected, _, _ = sm.run(steps[0], params, tx.init(params), data)
    state = tx.init(params)
    for number, tokens in enumerate(data):
        params, state, _ = steps[number % 2](params, state, tokens)
    assert sm.distance(params, expected) < 1e-5


# What is not finite


def with_faults(kind):
    """The model, which sends a NaN back through one block, or from the head, if a token says so."""

    @jax.custom_vjp
    def poison(x, bad):
        del bad
        return x

    poison.defvjp(lambda x, bad: (x, bad), lambda bad, dx: (jnp.where(bad, jnp.nan, dx), None))

    def embed(params, batch):
        tokens, bad = batch
        return sm.embed(params, tokens), jnp.zeros(()), bad.astype(jnp.float32)

    def block(layer, x):
        x, number, bad = x
        here = (number == 0) & (bad > 0) & (kind == "block")
        return poison(sm.block(layer, x), here), number + 1, bad

    def head(params, x, batch):
        kernel = poison(params["lm_head"]["kernel"], (batch[1] > 0) & (kind == "head"))
        loss = sm.head({**params, "lm_head": {"kernel": kernel}}, x[0], batch[0])
        return jnp.where((batch[1] > 0) & (kind == "loss"), jnp.inf, 1.0) * loss

    return embed, block, head


@functools.cache
def faulty(kind, pullback="full"):
    """A compiled step with windows of three, and the state that it begins with."""
    tx = gj.accumulate(gj.galore_sgd(1e-1, scale=1.0, **LENS), 3)
    step = jax.jit(layerwise.train_step(*with_faults(kind), tx, **sm.PULLBACKS[pullback]))
    return step, tx.init(sm.initial())


def projected(gradients, lens):
    """Blocks of a gradient, what a basis keeps of them."""
    blocks, bases = gradients["blocks"], lens.projectors["blocks"]
    onto = {name: bases[name]["kernel"] @ jnp.swapaxes(bases[name]["kernel"], 1, 2)
            for name in ("up", "down")}  # fmt: skip
    kept = {"up": {"kernel": onto["up"] @ blocks["up"]["kernel"]},
            "down": {"kernel": blocks["down"]["kernel"] @ onto["down"]}}  # fmt: skip
    return {**gradients, "blocks": {**blocks, **kept}}


@pytest.mark.parametrize("pullback", sm.PULLBACKS)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.sampled(2)
def test_a_block_that_is_not_finite_adds_nothing_to_its_window(pullback, place):
    """By hand: the mean over three micro-batches, of which one counts as zero in that block."""
    step, state = faulty("block", pullback)
    params, data = sm.initial(), sm.batches(6)
    for tokens in data[:3]:  # a window before it, whose sums must be forgotten
        params, state, _ = step(params, state, (tokens, jnp.int32(0)))
    begun = params
    for number, tokens in enumerate(data[3:]):
        params, state, metrics = step(params, state, (tokens, jnp.int32(number == place)))
        assert metrics.skipped == 2 * (number == place)  # the block, and the embedding before it
    gradients = [jax.grad(sm.loss_fn)(begun, tokens) for tokens in data[3:]]
    mean = jax.tree.map(lambda *g: sum(g) / 3, *gradients)
    without = jax.tree.map(lambda *g: (sum(g) - g[place]) / 3, *gradients)
    mean["embed"] = without["embed"]
    mean["blocks"] = jax.tree.map(lambda g, w: g.at[0].set(w[0]), mean["blocks"], without["blocks"])
    (lens,) = low_rank_states(state)
    assert lens.refresh_state.refreshes["blocks.up.kernel"].tolist() == [1] * sm.LAYERS
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, begun, projected(mean, lens))
    assert sm.distance(params, expected) < 1e-5


@pytest.mark.parametrize("pullback", sm.PULLBACKS)
def test_a_basis_that_was_not_found_is_looked_for_in_the_next_window(pullback):
    step, state = faulty("block", pullback)
    params = sm.initial()
    for number, tokens in enumerate(sm.batches(6)):
        params, state, _ = step(params, state, (tokens, jnp.int32(number == 0)))
        if number in (2, 5):
            (lens,) = low_rank_states(state)
            done, due = (getattr(lens.refresh_state, name)["blocks.up.kernel"].tolist()
                         for name in ("refreshes", "due"))  # fmt: skip
            assert done == [number == 5, 1, 1, 1] and due == [number == 2, False, False, False]


def test_a_loss_that_is_not_finite_is_no_micro_batch():
    step, state = faulty("loss")
    params, data = sm.initial(), sm.batches(6)
    expected = params, state
    for tokens in data:
        expected = step(*expected, (tokens, jnp.int32(0)))[:2]
        *same, metrics = step(params, state, (tokens, jnp.int32(1)))
        assert metrics.skipped == sm.LAYERS + 1
        params, state, _ = step(*same, (tokens, jnp.int32(0)))
    assert sm.distance(params, expected[0]) == 0
    assert state.mini_step == 0 and state.opt_state[0].count == 2


# Memory


@functools.cache
def compiled(pullback, layers):
    tx = gj.accumulate(gj.galore_adamw(1e-2, rank=8, axes=LENS["axes"], update_proj_gap=5), 4)
    step = layerwise.train_step(*sm.MODEL, tx, **sm.PULLBACKS[pullback])
    params = shapes(layers, False)
    arguments = params, jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((1, 5), jnp.int32)
    with jax.numpy_dtype_promotion("standard"):
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments)
    return lowered.compile(compiler_options=IN_PLACE)


@pytest.mark.parametrize("pullback", sm.PULLBACKS)
@pytest.mark.sampled(1)
def test_of_all_layers_there_are_sums_and_nothing_else(pullback):
    width, hidden = shapes(6, False)["blocks"]["up"]["kernel"].shape[1:]
    text = compiled(pullback, 6).as_text()
    held = {"parameter", "get-tuple-element", "bitcast", "dynamic-update-slice"}
    for shape in (f"6,{width},{hidden}", f"6,{hidden},{width}", f"6,{hidden},8"):
        assert creators(text, shape) <= held, shape
    assert f"f32[6,{hidden},8]" in text  # sums and moments
    growth = [compiled(pullback, n).memory_analysis().temp_size_in_bytes for n in (6, 16)]
    inputs = 10 * 4 * width * 4
    assert growth[1] - growth[0] < 2 * inputs
