"""A window of micro-batches is one step on their mean, from buffers of the size of a moment."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj
from galore_jax.transforms.lenses import low_rank_states, projection_leaves

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction

EVERY, WINDOWS, GAP = 8, 4, 2
SHAPES = {"heads": (6, 2, 4), "norm": (6,), "stack": (3, 6, 8), "tall": (10, 6)}
PARAMS = {name: jnp.full(shape, 0.1, jnp.float32) for name, shape in SHAPES.items()}
AXES = {"heads": gj.MatrixAxes(0, (1, 2)), "stack": gj.MatrixAxes()}
OPTIONS = {"rank": 3, "axes": AXES, "update_proj_gap": GAP}
LENS = {"rank": 3, "axes": AXES}
RATE = optax.linear_schedule(1e-2, 1e-3, 5)
MOMENTS8 = gj.quantized_state(optax.scale_by_adam(), min_size=2, block=8)


def sgd(learning_rate=1e-2, **options):
    return gj.galore_sgd(learning_rate, **(OPTIONS | options))


def adamw(**options):
    return gj.galore_adamw(RATE, **(OPTIONS | options))


def lens8(**options):
    lens = gj.low_rank_projection(MOMENTS8, **LENS, **({"refresh": GAP} | options))
    return optax.chain(lens, optax.scale_by_learning_rate(1e-2))


KINDS = {
    "sgd": sgd,
    "adamw": functools.partial(adamw, weight_decay=0.1),
    "rotate, short": functools.partial(adamw, transport=gj.transport.rotate()),
    "rotate, long": functools.partial(adamw, transport=gj.transport.rotate(), side="long"),
    "staggered": functools.partial(sgd, update_proj_gap=gj.refresh.staggered(3)),
    "adafactor": lambda: gj.galore_adafactor(RATE, **OPTIONS),
    "8 bits": lens8,
    "q-galore": lambda: lens8(
        codec=gj.codecs.int4(block=8), refresh=gj.refresh.adaptive(1, patience=1, threshold=1e-3)
    ),
    "partition": lambda: optax.partition(
        {"a": adamw(), "b": sgd(rank=2), "c": optax.adam(1e-2)},
        {"heads": "a", "norm": "c", "stack": "b", "tall": "a"},
    ),
    "masked": lambda: optax.masked(sgd(), {name: name != "tall" for name in PARAMS}),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1e3), adamw()),
}
# A code of 8 bits may tip where a sum is taken in another order.
TOLERANCE = {"8 bits": 2e-2, "q-galore": 2e-2}


class Compiled:
    """A transformation whose functions are compiled."""

    def __init__(self, tx):
        self.traces = 0
        self.start = jax.jit(tx.init)(PARAMS)
        self.update = jax.jit(functools.partial(self._update, tx))

    def _update(self, tx, gradients, state, params):
        self.traces += 1
        return tx.update(gradients, state, params)

    def run(self, gradients, state=None):
        """The last update and the state after it."""
        state = self.start if state is None else state
        for gradient in gradients:
            updates, state = self.update(gradient, state, PARAMS)
        return updates, state


@functools.cache
def compiled(name):
    """A kind, and its accumulation."""
    tx = KINDS[name]()
    return Compiled(tx), Compiled(gj.accumulate(tx, EVERY))


def draw(seed, dtype=jnp.float32):
    """A gradient: of a signal that all share, and noise of its own."""
    signal, noise = np.random.default_rng(99), np.random.default_rng(seed)
    return {
        name: jnp.asarray(signal.normal(size=shape) + 0.5 * noise.normal(size=shape), dtype)
        for name, shape in SHAPES.items()
    }


def mean(gradients):
    return jax.tree.map(lambda *gs: np.mean([np.asarray(g, np.float64) for g in gs], 0), *gradients)


def big_batch(gradients):
    return jax.tree.map(lambda g, p: jnp.asarray(g, p.dtype), mean(gradients), gradients[0])


def window(number, every=EVERY, equal=False):
    return [draw(1000 * number + (0 if equal else i)) for i in range(every)]


def signature(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype, jax.typeof(x).weak_type) for x in leaves]


def due(state):
    return any(
        np.any(x) for lens in low_rank_states(state) for x in leaves_of(lens.refresh_state.due)
    )


def leaves_of(tree):
    return jax.tree.leaves(tree)


def assert_close(ours, theirs, tolerance):
    """Leaf by leaf, relative to the norm of the leaf."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(ours)]
    for path, a, b in zip(paths, leaves_of(ours), leaves_of(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), path


def assert_same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(leaves_of(ours), leaves_of(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.sampled(3)
def test_a_window_is_a_step_on_the_mean(name):
    plain, ours = compiled(name)
    state, expected_state, refreshed = ours.start, plain.start, 0
    params = PARAMS
    for number in range(WINDOWS):
        refreshed += due(expected_state)
        gradients = window(number, equal=due(expected_state))
        for i, gradient in enumerate(gradients, 1):
            updates, state = ours.update(gradient, state, params)
            assert signature(updates) == signature(params)
            assert signature(state) == signature(ours.start)
            assert state.mini_step == i % EVERY
            if i < EVERY:
                assert not any(map(np.any, leaves_of(updates)))
        expected, expected_state = plain.update(big_batch(gradients), expected_state, params)
        assert any(map(np.any, leaves_of(expected)))
        assert_close(updates, expected, TOLERANCE.get(name, 1e-5))
        if name not in TOLERANCE:
            assert_close(state.opt_state, expected_state, 1e-5)
        params = optax.apply_updates(params, expected)
    assert ours.traces == 1
    # There was a window of both kinds, and counts are of windows.
    assert refreshed >= 2
    assert refreshed < WINDOWS or name == "staggered"
    for lens, other in zip(low_rank_states(state), low_rank_states(expected_state), strict=True):
        assert_same_bits(lens.refresh_state.refreshes, other.refresh_state.refreshes)
        assert lens.count == WINDOWS


def test_without_a_lens_it_is_multi_steps():
    ours = Compiled(gj.accumulate(optax.adamw(RATE), 3))
    theirs = Compiled(optax.MultiSteps(optax.adamw(RATE), 3).gradient_transformation())
    for steps in (3, 5, 6):
        (updates, _), (expected, _) = ours.run(window(0, steps)), theirs.run(window(0, steps))
        assert_close(updates, expected, 1e-5)
    tx = gj.accumulate(optax.adam(1e-2), 3)
    updates, _ = jax.jit(tx.update)(draw(0), tx.init(PARAMS))  # and needs no parameters
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


def test_a_window_of_one_is_a_step():
    plain, _ = compiled("adamw")
    ours = Compiled(gj.accumulate(adamw(weight_decay=0.1), 1))
    for steps in (1, 2, 3):
        (updates, state), (expected, expected_state) = (
            ours.run(window(0, steps)),
            plain.run(window(0, steps)),
        )
        assert_close((updates, state.opt_state), (expected, expected_state), 1e-5)
        assert state.mini_step == 0


# Windows in which a basis is new


@pytest.mark.parametrize("name", ["sgd", "adamw", "q-galore", "rotate, long"])
def test_a_basis_comes_from_the_first_micro_batch(name):
    plain, ours = compiled(name)
    state, refreshed = ours.start, []
    for number in range(WINDOWS):
        was_due, old = due(state.opt_state), state.opt_state
        gradients = window(number)
        (expected,) = low_rank_states(plain.run(gradients[:1], old)[1])
        bases = []
        for gradient in gradients:
            _, state = ours.update(gradient, state, PARAMS)
            bases.append(state.projectors)
        (lens,) = low_rank_states(state)
        assert_same_bits(bases[0], bases[-1])
        assert_close(decoded(bases[0]), decoded(expected.projectors), 1e-5)
        assert_close(decoded(lens.projectors), decoded(bases[0]), 1e-6)
        assert_same_bits(lens.refresh_state.refreshes, expected.refresh_state.refreshes)
        moved = bool(np.any(state.moved["stack"]))
        assert moved == was_due
        refreshed.append(moved)
    assert refreshed[0] and set(refreshed) == {True, False}


def decoded(tree):
    return jax.tree.map(
        gj.quant.dequantize, tree, is_leaf=lambda x: isinstance(x, gj.quant.QuantizedArray)
    )


def test_the_mean_is_projected_onto_the_basis_of_the_window():
    """By hand: -rate · scale · mean(G)·P·Pᵀ in the view of every leaf."""
    _, ours = compiled("sgd")
    state = None
    for number in range(3):
        updates, state = ours.run(window(number), state)
        expected = mean(window(number))
        for name, whole in expected.items():
            if name != "norm":
                basis = np.asarray(state.projectors[name], np.float64)
                whole = 0.25 * projection(name, whole, basis)
            np.testing.assert_allclose(updates[name], -1e-2 * whole, atol=1e-7)


def projection(path, gradient, basis):
    """Onto the short side: columns of `tall`, rows of all others."""
    onto = basis @ np.swapaxes(basis, -1, -2)
    if path == "tall":
        return gradient @ onto
    rows = gradient.shape[-2] if path == "stack" else gradient.shape[0]
    return (onto @ gradient.reshape(*basis.shape[:-2], rows, -1)).reshape(gradient.shape)


@pytest.mark.parametrize("name", ["rotate, short", "8 bits", "q-galore"])
def test_updates_of_adam_lie_in_the_span_of_the_basis(name):
    _, ours = compiled(name)
    state = None
    for number in range(3):
        updates, state = ours.run(window(number), state)
        for leaf in ("tall", "stack", "heads"):
            basis = np.linalg.qr(np.asarray(decoded(state.projectors[leaf]), np.float64))[0]
            whole = np.asarray(updates[leaf], np.float64)
            assert np.any(whole)
            outside = whole - projection(leaf, whole, basis)
            assert np.linalg.norm(outside) <= 1e-6 * np.linalg.norm(whole)


def test_a_clip_sees_projected_gradients():
    """The norm of what is emitted is the limit: the subspace keeps all that the clip saw."""
    tx = optax.chain(optax.clip_by_global_norm(0.1), sgd(scale=1.0))
    ours = Compiled(gj.accumulate(tx, 2))
    updates, state = ours.run(window(0, 2))
    np.testing.assert_allclose(optax.tree.norm(updates), 1e-2 * 0.1, rtol=1e-5)
    updates, state = ours.run(window(1, 2), state)
    np.testing.assert_allclose(optax.tree.norm(updates), 1e-2 * 0.1, rtol=1e-5)


# What is not a number


def poisoned(gradient, name="tall"):
    return gradient | {name: gradient[name].at[..., 1].set(jnp.nan)}


@pytest.mark.parametrize("place", [0, 1, EVERY - 1])
def test_a_window_with_a_nan_leaves_no_trace_in_the_next(place):
    _, ours = compiled("sgd")
    gradients = window(0)
    gradients[place] = poisoned(gradients[place])
    updates, state = ours.run(gradients)
    (lens,), (start,) = low_rank_states(state), low_rank_states(ours.start)
    assert np.isnan(updates["tall"]).any() and np.isfinite(updates["stack"]).all()
    if place == 0:  # nothing to make a basis from: it stays, and stays due
        assert_same_bits(lens.projectors["tall"], start.projectors["tall"])
    assert lens.refresh_state.refreshes["tall"] == (place > 0)
    assert lens.refresh_state.due["tall"] == (place == 0)
    assert lens.refresh_state.refreshes["stack"].tolist() == [1, 1, 1]
    assert np.isfinite(lens.projectors["tall"]).all()
    updates, state = ours.run(window(1), state)
    (lens,) = low_rank_states(state)
    assert lens.refresh_state.refreshes["tall"] == 1
    assert all(np.isfinite(x).all() for x in leaves_of((updates, state)))


def test_apply_if_finite_around_it_skips_a_micro_batch():
    _, ours = compiled("adamw")
    guarded = Compiled(optax.apply_if_finite(gj.accumulate(adamw(weight_decay=0.1), EVERY), 3))
    gradients = window(0)
    expected = ours.run(gradients)
    for place in (0, 1, EVERY - 1):
        bad = [*gradients[:place], poisoned(gradients[0]), *gradients[place:]]
        updates, state = guarded.run(bad)
        assert state.total_notfinite == 1
        assert_close((updates, state.inner_state), expected, 1e-6)


def test_apply_if_finite_inside_it_is_refused_if_there_is_a_lens():
    """It returns zeros like its input, which are projected gradients then."""
    for wrapper in (
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.transforms.conditionally_mask(tx, lambda step: step > 1),
    ):
        with pytest.raises(ValueError, match="accumulate"):
            gj.accumulate(optax.chain(wrapper(sgd())), 2).init(PARAMS)
    ours = Compiled(gj.accumulate(optax.apply_if_finite(optax.sgd(1.0), 3), 2))
    updates, state = ours.run([draw(0), poisoned(draw(1))])
    assert not any(map(np.any, leaves_of(updates)))
    updates, _ = ours.run([draw(2), draw(4)], state)
    assert_close(updates, jax.tree.map(lambda g: -g, big_batch([draw(2), draw(4)])), 1e-6)


# Buffers


WIDE = {"w": jnp.ones((24, 40))}  # no other array of its step has as many entries


def folded(tx, mini_step, wrap=lambda update: update, gradients=WIDE):
    """The compiled update with a known place in the window: the branches not taken are gone."""

    def update(gradients, state):
        state = state._replace(mini_step=jnp.full((), mini_step, jnp.int32))
        return tx.update(gradients, state, WIDE)

    return jax.jit(wrap(update)).lower(gradients, jax.eval_shape(tx.init, WIDE)).compile()


def test_no_buffer_has_the_size_of_a_projected_leaf():
    tx = gj.galore_adamw(1e-2, rank=3)
    ours, theirs = gj.accumulate(tx, 4), optax.MultiSteps(tx, 4)
    assert all(x.size < 24 * 40 for x in leaves_of(ours.init(WIDE)))
    assert any(x.size == 24 * 40 for x in leaves_of(theirs.init(WIDE)))
    sums, basis, flag, count = 40 * 3 * 4, 24 * 3 * 4, 1, 4
    assert bytes_of(ours, WIDE) - bytes_of(tx, WIDE) == sums + basis + flag + count


def bytes_of(tx, params):
    return sum(x.size * x.dtype.itemsize for x in leaves_of(jax.eval_shape(tx.init, params)))


def full_size(program):
    """What makes arrays in the shape of the leaf, in a compiled program."""
    lines = [x for x in program.as_text().splitlines() if "calls=%wrapped_broadcast" not in x]
    return set(re.findall(r"= f32\[24,40\]\S* ([\w-]+)\(", "\n".join(lines)))


def test_a_micro_batch_that_is_not_the_last_computes_nothing_of_full_size():
    tx = gj.accumulate(gj.galore_adamw(1e-2, rank=3), 4)
    middle, last = folded(tx, 1), folded(tx, 3)
    # The gradient comes in, and a zero update goes out.
    assert full_size(middle) <= {"parameter", "broadcast"}
    assert middle.memory_analysis().temp_size_in_bytes < 24 * 40 * 4
    assert "dot" in full_size(last)


# Dtypes and tracing


@pytest.mark.parametrize("options", [{}, {"state_dtype": "bfloat16"}], ids=str)
def test_bf16_gradients_are_summed_up_in_fp32(options):
    make = functools.partial(gj.galore_sgd, 1e-2, **(OPTIONS | options))
    tx = gj.accumulate(make(), EVERY)
    gradients = [without_heads(draw(seed, jnp.bfloat16)) for seed in range(EVERY)]
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), without_heads(PARAMS))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        state, update = tx.init(params), jax.jit(tx.update)
        before = signature(state)
        for gradient in gradients:
            updates, state = update(gradient, state, params)
            assert signature(state) == before
            assert all(x.dtype == jnp.bfloat16 for x in updates.values())
    assert all(x.dtype == jnp.float32 for x in state.sums.values())
    (lens,) = low_rank_states(state)
    for name, whole in mean(gradients).items():
        if name != "norm":
            whole = 0.25 * projection(name, whole, np.asarray(lens.projectors[name], np.float64))
        error = np.linalg.norm(np.asarray(updates[name], np.float64) + 1e-2 * whole)
        assert error <= 5e-3 * np.linalg.norm(1e-2 * whole), name


def without_heads(tree):
    """XLA has no CPU kernel for a product of that leaf in bf16, with or without a window."""
    return {name: leaf for name, leaf in tree.items() if name != "heads"}


def test_a_sum_does_not_stall_when_what_it_adds_is_small():
    """In bf16, 256 + 1 is 256."""
    params = {"w": jnp.zeros((6, 8), jnp.bfloat16), "b": jnp.zeros((8,), jnp.bfloat16)}
    tx = gj.accumulate(gj.galore_sgd(1.0, 2, scale=1.0, state_dtype="bfloat16"), 512)
    ones = jax.tree.map(jnp.ones_like, params)

    @jax.jit
    def run(state):
        step = lambda state, _: (tx.update(ones, state, params)[1], None)  # noqa: E731
        return jax.lax.scan(step, state, None, 511)[0]

    updates, _ = jax.jit(tx.update)(ones, run(tx.init(params)), params)
    for update in updates.values():
        np.testing.assert_allclose(np.asarray(update, np.float32), -1.0, rtol=2e-2)


def test_updates_have_the_dtype_of_the_parameters_whatever_is_emitted():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = gj.accumulate(optax.adamw(1e-2, mu_dtype=jnp.float32), 2)  # emits fp32
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(2):
        updates, state = update(draw(seed), state, params)
        assert all(x.dtype == jnp.bfloat16 for x in updates.values())
    assert any(map(np.any, leaves_of(updates)))


def test_integers_and_none_pass_through():
    params = {"w": jnp.ones((6, 8)), "n": jnp.asarray(3), "none": None}
    tx = gj.accumulate(gj.low_rank_projection(optax.identity(), 2), 2)
    state, update = tx.init(params), jax.jit(tx.update)
    updates, state = update(params, state, params)
    assert updates["n"] == 0 and updates["n"].dtype == jnp.int32 and updates["none"] is None
    updates, state = update(params, state, params)
    assert updates["n"] == 3


def test_a_scan_over_windows_and_a_donated_state():
    _, ours = compiled("adamw")
    gradients = [*window(0), *window(1)]
    expected, expected_state = ours.run(gradients)
    tx = gj.accumulate(KINDS["adamw"](), EVERY)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, gradients):
        def step(state, gradient):
            updates, state = tx.update(gradient, state, PARAMS)
            return state, updates

        state, updates = jax.lax.scan(step, state, gradients)
        return jax.tree.map(lambda x: x[-1], updates), state

    start = tx.init(PARAMS)  # not compiled: no two of its arrays may be one buffer
    assert_same_bits(start, ours.start)
    updates, state = run(start, jax.tree.map(lambda *xs: jnp.stack(xs), *gradients))
    assert all(x.is_deleted() for x in leaves_of(start))
    assert_close((updates, state), (expected, expected_state), 1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_abstract_init_is_concrete_init(name):
    _, ours = compiled(name)
    tx = gj.accumulate(KINDS[name](), EVERY)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    for abstract in (jax.eval_shape(tx.init, PARAMS), jax.eval_shape(tx.init, shapes)):
        assert jax.tree.structure(abstract) == jax.tree.structure(ours.start)
        for a, b in zip(leaves_of(abstract), leaves_of(ours.start), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_layers_of_a_stack_one_at_a_time():
    """With `layer`, a slice has the randomness of its place in the stack."""
    tx = gj.accumulate(sgd(projector=gj.projectors.random_orthonormal()), 2)
    stacks = [{"stack": g["stack"]} for g in window(0, 2)]
    whole = tx.init(stacks[0])
    for gradient in stacks:
        expected, whole = tx.update(gradient, whole, gradient)
    update = jax.jit(lambda g, s, layer: tx.update(g, s, g, layer=layer))
    for layer in range(3):
        gradients = [{"stack": g["stack"][layer]} for g in stacks]
        state = tx.init(gradients[0])
        for gradient in gradients:
            updates, state = update(gradient, state, layer)
        np.testing.assert_allclose(updates["stack"], expected["stack"][layer], atol=1e-6)


# Gradients that are local to each device


DEVICES = 8


def draw_local(seed):
    """``[devices, ...]``."""
    draws = [draw(1000 * seed + device) for device in range(DEVICES)]
    return jax.tree.map(lambda *gs: jnp.asarray(np.stack(gs)), *draws)


def local_mean(gradients):
    return jnp.asarray(np.mean(np.asarray(gradients), 0))


def stacked(trees):
    return jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs, 1)), *trees)


def reduced_first(gradients):
    """Updates of windows of three."""
    ours = Compiled(gj.accumulate(adamw(), 3))
    state, emitted = None, []
    for i in range(0, len(gradients), 3):
        means = [jax.tree.map(local_mean, g) for g in gradients[i : i + 3]]
        updates, state = ours.run(means, state)
        emitted.append(updates)
    return emitted, state


def test_pmap_keeps_local_sums_and_equals_reducing_first():
    tx = gj.accumulate(adamw(axis_name="data"), 3)
    gradients = [draw_local(seed) for seed in range(6)]
    update = jax.pmap(lambda g, s: tx.update(g, s, PARAMS), axis_name="data")
    state = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), jax.jit(tx.init)(PARAMS))
    emitted = []
    for i, gradient in enumerate(gradients):
        updates, state = update(gradient, state)
        if i % 3 == 1:
            assert all(np.min(np.ptp(np.asarray(x), axis=0)) > 0 for x in state.sums.values())
        shared = updates, state.opt_state, state.projectors, state.moved, state.mini_step
        for x in leaves_of(shared):
            np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
        if i % 3 == 2:
            emitted.append(jax.tree.map(lambda x: x[0], updates))
    expected, expected_state = reduced_first(gradients)
    assert_close(emitted, expected, 1e-5)
    first = jax.tree.map(lambda x: x[0], state.opt_state)
    for lens, other in zip(low_rank_states(first), low_rank_states(expected_state), strict=True):
        assert_same_bits(lens.refresh_state, other.refresh_state)
        assert_close(lens.projectors, other.projectors, 1e-5)


def mesh_of_devices():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def by_shard_map(fn, check_vma):
    spec = jax.sharding.PartitionSpec
    return jax.shard_map(
        lambda gradients, state: fn(jax.tree.map(lambda g: g[0], gradients), state),
        mesh=mesh_of_devices(),
        in_specs=(spec("data"), spec()),
        out_specs=spec(),
        check_vma=check_vma,
    )


@pytest.mark.parametrize("way", ["checked", "checked, local sums", "unchecked"])
@pytest.mark.sampled(1)
def test_a_scan_in_a_shard_map_equals_reducing_first(way):
    tx = gj.accumulate(adamw(axis_name="data"), 3)

    def step(carry, gradient):
        updates, state = tx.update(gradient, carry[1], PARAMS)
        return (jax.tree.map(jnp.add, carry[0], updates), state), None

    def local(gradients, state):
        begun = state
        if way == "checked, local sums":
            state = state._replace(sums=jax.lax.pcast(state.sums, "data", to="varying"))
        zeros = jax.tree.map(jnp.zeros_like, PARAMS)
        (updates, state), _ = jax.lax.scan(step, (zeros, state), gradients)
        return updates, state._replace(sums=begun.sums)

    run = jax.jit(by_shard_map(local, check_vma=way != "unchecked"))
    gradients = [draw_local(seed) for seed in range(6)]
    expected, expected_state = reduced_first(gradients)
    state = jax.jit(tx.init)(PARAMS)
    for i in range(2):
        updates, state = run(stacked(gradients[3 * i : 3 * i + 3]), state)
        assert_close(updates, expected[i], 1e-5)
    for lens, other in zip(low_rank_states(state), low_rank_states(expected_state), strict=True):
        assert_close(lens.inner_state, other.inner_state, 1e-5)


def test_what_one_device_finds_not_finite_is_so_for_all():
    tx = gj.accumulate(sgd(axis_name="data"), 3)
    update = jax.jit(by_shard_map(lambda g, s: tx.update(g, s, PARAMS), check_vma=False))
    state = jax.jit(tx.init)(PARAMS)
    bad = draw_local(0)
    bad["tall"] = bad["tall"].at[5, 1, 1].set(jnp.inf)
    for gradient in (bad, draw_local(1), draw_local(2)):
        updates, state = update(gradient, state)
    (lens,) = low_rank_states(state)
    assert lens.refresh_state.refreshes["tall"] == 0 and lens.refresh_state.due["tall"]
    assert np.isfinite(updates["stack"]).all() and not np.isfinite(updates["tall"]).all()
    for seed in (3, 4, 5):
        updates, state = update(draw_local(seed), state)
    (lens,) = low_rank_states(state)
    assert lens.refresh_state.refreshes["tall"] == 1 and np.isfinite(updates["tall"]).all()


def reductions(text):
    """Sizes of all arrays that are reduced or gathered, per computation of the program."""
    found, name = {}, ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.split()[0]
        match = re.search(r"= (.*?) all-(?:reduce|gather|to-all)(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [int(np.prod([int(n) for n in s.split(",") if n] or [1])) for s in shapes]
            found.setdefault(name, []).extend(sizes)
    return found


@pytest.mark.parametrize("way", ["shard_map", "pmap"])
def test_one_reduction_of_the_size_of_a_moment_per_window(way):
    tx = gj.accumulate(gj.galore_adamw(1e-2, rank=3, axis_name="data"), 3)
    gradients = {"w": jnp.ones((DEVICES, 24, 40))}

    def program(mini_step):
        def update(gradients, state):
            if mini_step is not None:
                state = state._replace(mini_step=jnp.full((), mini_step, jnp.int32))
            return tx.update(gradients, state, WIDE)

        state = jax.eval_shape(tx.init, WIDE)
        if way == "shard_map":
            mapped = jax.jit(by_shard_map(update, check_vma=False))
        else:
            mapped = jax.pmap(update, axis_name="data", in_axes=(0, None))
        return reductions(mapped.lower(gradients, state).compile().as_text())

    assert program(1) == {}
    (last,) = program(2).values()
    assert last == [40 * 3]
    sketches = [size for sizes in program(0).values() for size in sizes]
    assert sketches and max(sketches) < 24 * 40 / 2
    whole = program(None)
    assert sorted(size for sizes in whole.values() for size in sizes) == sorted([*last, *sketches])
    assert not any(name in ("ENTRY", "HloModule") for name in whole)  # in conditionals only


def test_parameters_of_each_device_its_own():
    """No axis to reduce over, but all arrays vary over one: zeros have to as well."""
    spec = jax.sharding.PartitionSpec("data")
    tx = gj.accumulate(sgd(), 2)

    def local(gradients, state):
        gradients, state = jax.tree.map(lambda x: x[0], (gradients, state))
        updates, state = tx.update(gradients, state, gradients)
        return jax.tree.map(lambda x: x[None], (updates, state))

    update = jax.jit(
        jax.shard_map(local, mesh=mesh_of_devices(), in_specs=(spec, spec), out_specs=spec)
    )
    state = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), jax.jit(tx.init)(PARAMS))
    _, state = update(draw_local(0), state)
    updates, state = update(draw_local(1), state)
    alone = Compiled(tx)
    for device in (0, 5):
        mine = [jax.tree.map(lambda x, d=device: x[d], draw_local(seed)) for seed in (0, 1)]
        expected, _ = alone.run(mine)
        assert_close(jax.tree.map(lambda x, d=device: x[d], updates), expected, 1e-5)


# Gradients that arrive projected


def given(gradient, state, fresh, kinds):
    """The gradient in the bases of a state, or the `fresh` ones if they are due."""
    found = dict(gradient)
    (lens,) = projection_leaves(state, PARAMS)
    for plan, stored, due, *_ in lens.subspaces:
        if plan.path in kinds:
            basis = fresh[plan.path] if np.any(due) else stored
            value = plan.view.project(gradient[plan.path], basis)
            moved = due if kinds[plan.path] == "moved" else None
            found[plan.path] = gj.ProjectedGradient(value, basis, moved)
    return found


@pytest.mark.parametrize(
    "kinds",
    [
        {"heads": "moved", "stack": "moved", "tall": "moved"},
        {"heads": "bare", "stack": "bare", "tall": "moved"},
        {"stack": "bare"},
    ],
    ids=["moved", "bare", "mixed"],
)
def test_projected_gradients_do_what_gradients_do(kinds):
    _, full = compiled("adamw")
    low = Compiled(gj.accumulate(KINDS["adamw"](), EVERY))
    state = projected_state = full.start
    for number in range(3):
        for gradient in window(number):
            expected, state = full.update(gradient, state, PARAMS)
            taken = given(gradient, projected_state, state.projectors, kinds)
            assert isinstance(taken["stack"], gj.ProjectedGradient)
            updates, projected_state = low.update(taken, projected_state, PARAMS)
            assert signature(updates) == signature(PARAMS)
        assert any(map(np.any, leaves_of(expected)))
        assert_close(updates, expected, 1e-5)
        assert_close(projected_state.opt_state, state.opt_state, 1e-5)
        assert_same_bits(projected_state.moved, state.moved)
    assert low.traces == 1


def test_projection_leaves_are_those_of_the_window():
    """What a backward pass that projects has to read: bases as they are used, due once."""
    _, ours = compiled("adamw")
    state = ours.start
    for i, gradient in enumerate([*window(0), *window(1), *window(2)]):
        (before,) = projection_leaves(state, PARAMS)
        _, state = ours.update(gradient, state, PARAMS)
        for leaf in before.subspaces:
            if leaf.plan.is_projected:
                refreshes = i in (0, 2 * EVERY)
                assert np.all(leaf.due == refreshes)
                same = np.array_equal(leaf.stored, state.projectors[leaf.plan.path])
                assert same != refreshes


# Other people's wrappers


def test_hyperparameters_are_injected_inside_and_outside():
    _, ours = compiled("sgd")
    make = optax.inject_hyperparams(gj.galore_sgd, static_args=gj.STATIC_ARGS)
    inside = Compiled(gj.accumulate(make(1e-2, **OPTIONS), EVERY))
    outer = optax.inject_hyperparams(lambda rate: gj.accumulate(sgd(learning_rate=rate), EVERY))
    outside = Compiled(outer(rate=1e-2))
    expected, _ = ours.run(window(0))
    for other in (inside, outside):
        updates, _ = other.run(window(0))
        assert_close(updates, expected, 1e-5)
    start = outside.start._replace(hyperparams={"rate": jnp.asarray(2e-2)})
    updates, _ = outside.run(window(0), start)
    assert_close(updates, jax.tree.map(lambda x: 2 * x, expected), 1e-5)


def test_a_partition_around_it_is_a_partition_inside_it():
    _, inside = compiled("partition")
    parts = {"a": adamw(), "b": sgd(rank=2), "c": optax.adam(1e-2)}
    outside = Compiled(
        optax.partition(
            {label: gj.accumulate(tx, EVERY) for label, tx in parts.items()},
            {"heads": "a", "norm": "c", "stack": "b", "tall": "a"},
        )
    )
    ours, theirs = outside.start, inside.start
    for number in range(2):
        updates, ours = outside.run(window(number), ours)
        expected, theirs = inside.run(window(number), theirs)
        assert_close(updates, expected, 1e-5)


def test_windows_of_windows():
    nested = Compiled(gj.accumulate(gj.accumulate(sgd(), 2), 4))
    _, ours = compiled("sgd")
    state = None
    expected_state = None
    for number in range(3):
        updates, state = nested.run(window(number), state)
        expected, expected_state = ours.run(window(number), expected_state)
        assert_close(updates, expected, 1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx")
    with nnx.use_eager_sharding(False), jax.numpy_rank_promotion("allow"):
        model = nnx.Linear(6, 10, rngs=nnx.Rngs(0))
        tx = gj.accumulate(gj.galore_adamw(1e-2, rank=3), 2)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)

        @nnx.jit
        def step(model, optimizer):
            gradients = nnx.grad(lambda model: jnp.mean((model(x) - x[:, :1]) ** 2))(model)
            optimizer.update(model, gradients)

        kernels = [np.asarray(model.kernel[...])]
        for _ in range(4):
            step(model, optimizer)
            kernels.append(np.asarray(model.kernel[...]))
    changed = [not np.array_equal(a, b) for a, b in itertools.pairwise(kernels)]
    assert changed == [False, True, False, True]
    shapes = {x.shape for x in leaves_of(optimizer.opt_state.sums)}
    assert shapes == {(10, 3), (10,)}


@pytest.mark.filterwarnings("ignore")  # orbax' own
@pytest.mark.parametrize("name", ["adamw", "q-galore"])
def test_saved_and_restored_within_a_window(name, tmp_path):
    from orbax.checkpoint import v1

    _, ours = compiled(name)
    gradients = [*window(0), *window(1)]
    expected = ours.run(gradients)
    for middle in (EVERY - 3, EVERY + 1):
        _, state = ours.run(gradients[:middle])
        directory = tmp_path / str(middle)
        with v1.training.Checkpointer(directory) as checkpointer:
            checkpointer.save_checkpointables(0, {"state": state})
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), ours.start
        )
        with v1.training.Checkpointer(directory) as checkpointer:
            restored = checkpointer.load_checkpointables(0, {"state": shapes})["state"]
        assert_same_bits(restored, state)
        assert_same_bits(ours.run(gradients[middle:], restored), expected)


# On a mesh


SPECS = {
    "heads": (None, "model"),
    "norm": ("data",),
    "stack": (None, "data"),
    "tall": ("data", "model"),
}


def on_mesh(kind):
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(kind,) * 2, devices=jax.devices()[:4]
    )
    named = jax.sharding.NamedSharding
    return {k: named(mesh, jax.sharding.PartitionSpec(*spec)) for k, spec in SPECS.items()}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.sampled(1)
def test_the_same_numbers_on_a_mesh(kind):
    sharding = on_mesh(getattr(jax.sharding.AxisType, kind))
    _, ours = compiled("adamw")
    tx = gj.accumulate(KINDS["adamw"](), EVERY)
    params = jax.device_put(PARAMS, sharding)
    state = gj.init_sharded(tx, params, sharding)
    update = jax.jit(tx.update, out_shardings=(sharding, jax.tree.map(lambda x: x.sharding, state)))
    expected, expected_state = ours.run([*window(0), *window(1)])
    for gradient in [*window(0), *window(1)]:
        updates, state = update(jax.device_put(gradient, sharding), state, params)
    assert_close(jax.device_get(updates), expected, 1e-5)
    assert_close(jax.device_get(state.opt_state), expected_state.opt_state, 1e-5)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("name", ["adamw", "q-galore", "partition"])
def test_sums_are_sharded_like_moments_and_bases_like_bases(name, spread):
    sharding = on_mesh(jax.sharding.AxisType.Auto)
    tx = KINDS[name]()
    state = gj.state_sharding(gj.accumulate(tx, EVERY), PARAMS, sharding, spread=spread)
    inner = gj.state_sharding(tx, PARAMS, sharding, spread=spread)
    assert state.opt_state == inner
    assert state.mini_step.is_fully_replicated
    assert all(x.is_fully_replicated for x in leaves_of(state.moved))
    assert state.sums["norm"].spec == sharding["norm"].spec
    assert state.projectors["norm"].is_fully_replicated
    bases = {}
    for lens in low_rank_states(inner):
        bases |= {path: x for path, x in lens.projectors.items() if leaves_of(x)}
    for leaf in ("heads", "stack", "tall"):
        assert state.projectors[leaf] == bases[leaf]
    # Like a moment: tall [10, 6] keeps its rows, stack [3, 6, 8] its columns.
    like = gj.state_sharding(adamw(), PARAMS, sharding, spread=spread)[0].inner_state.mu
    for leaf in SHAPES:
        assert state.sums[leaf] == like[leaf]
    assert next(iter(state.sums["tall"].spec)) == "data"
    assert tuple(state.sums["stack"].spec) == (None, "data" if spread else None, None)


def test_a_window_inside_a_mask_is_sharded_too():
    sharding = on_mesh(jax.sharding.AxisType.Auto)
    mask = {name: name != "heads" for name in SHAPES}
    ours = gj.state_sharding(gj.accumulate(adamw(), 2), PARAMS, sharding)
    tx = optax.masked(gj.accumulate(adamw(), 2), mask)
    masked = gj.state_sharding(tx, PARAMS, sharding)
    assert jax.tree.structure(masked) == jax.tree.structure(jax.eval_shape(tx.init, PARAMS))
    for tree in ("sums", "projectors", "moved"):
        found = getattr(masked.inner_state, tree)
        for name in ("norm", "stack", "tall"):
            assert found[name] == getattr(ours, tree)[name]


# Errors


@pytest.mark.parametrize(
    "every, error",
    [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), ("2", TypeError)],
)
def test_the_number_of_micro_batches_is_a_positive_integer(every, error):
    with pytest.raises(error, match="`every`"):
        gj.accumulate(sgd(), every)


def test_params_are_needed_if_a_leaf_is_projected():
    tx = gj.accumulate(sgd(), 2)
    with pytest.raises(ValueError, match=r"'heads'.*`params`"):
        tx.update(PARAMS, tx.init(PARAMS))
    tx = gj.accumulate(sgd(targets="nothing"), 2)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    assert signature(updates) == signature(PARAMS)


def test_a_projected_gradient_of_a_leaf_that_is_not_projected_is_named():
    gradient = PARAMS | {"norm": gj.ProjectedGradient(jnp.ones((6, 3)), jnp.eye(6, 3))}
    for tx in (sgd(), optax.sgd(1e-2)):
        ours = gj.accumulate(tx, 2)
        with pytest.raises(ValueError, match="'norm'"):
            ours.update(gradient, ours.init(PARAMS), PARAMS)
