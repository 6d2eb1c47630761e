"""A window of micro-batches is one step on their mean, from buffers of the size of a moment."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from windows import (
    EVERY,
    KINDS,
    OPTIONS,
    PARAMS,
    RATE,
    TOLERANCE,
    WIDE,
    WINDOWS,
    Compiled,
    adamw,
    assert_close,
    assert_same_bits,
    big_batch,
    compiled,
    draw,
    due,
    leaves_of,
    mean,
    sgd,
    signature,
    window,
)

import galore_jax as gj
from galore_jax.transforms.lenses import projection_leaves
from galore_jax.transforms.state import low_rank_states

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction


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


# Gradients that arrive projected


def given(gradient, state, fresh, kinds):
    """The gradient in the bases of a state, or the `fresh` ones if they are due."""
    found = dict(gradient)
    (lens,) = projection_leaves(state, PARAMS)
    for plan, stored, is_due, *_ in lens.subspaces:
        if plan.path in kinds:
            basis = fresh[plan.path] if np.any(is_due) else stored
            value = plan.view.project(gradient[plan.path], basis)
            moved = is_due if kinds[plan.path] == "moved" else None
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
