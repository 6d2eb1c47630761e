"""Moments in 8 bits: close to the fp32 ones, wherever and with whatever they are used."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import galore_jax as gj
from galore_jax.quant import PowerArray, power
from galore_jax.transport import BasisChange

SHAPES = {"big": (48, 64), "small": (5,), "tall": (2, 64, 32), "w": (16, 16)}
LARGE = ("big", "tall")
MIN_SIZE = 300  # between `w` and `tall`


def gradients(steps=50, shapes=SHAPES, dtype=jnp.float32, seed=0):
    """A direction that persists and noise about twice as large, over two decades of scales."""
    rng = np.random.default_rng(seed)
    scale = {name: np.exp(rng.normal(size=shape)) for name, shape in shapes.items()}
    mean = {name: 0.5 * rng.normal(size=shape) for name, shape in shapes.items()}
    return [
        {
            name: jnp.asarray(scale[name] * (mean[name] + rng.normal(size=shape)), dtype)
            for name, shape in shapes.items()
        }
        for _ in range(steps)
    ]


GRADIENTS = gradients()


def follow(tx, grads=GRADIENTS, params=None):
    state = jax.jit(tx.init)(grads[0] if params is None else params)
    step = jax.jit(lambda g, s: tx.update(g, s, params))
    updates = []
    for grad in grads:
        update, state = step(grad, state)
        updates.append(update)
    return updates, state


def worst(ours, exact, name):
    """The greatest relative error of the updates of a leaf over the steps."""
    errors = [
        np.linalg.norm(a[name] - b[name]) / np.linalg.norm(b[name])
        for a, b in zip(ours, exact, strict=True)
    ]
    return max(errors)


def signature(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_close(one, other, bound=1e-3):
    """The same but for the last bits, by which two compiled programs may differ."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(decode(one)), jax.tree.leaves(decode(other)), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


def decode(tree):
    return jax.tree.map(
        lambda x: power.decode(x) if isinstance(x, PowerArray) else x,
        tree,
        is_leaf=lambda x: isinstance(x, PowerArray),
    )


# Close to full precision

# Inner, and a bound on the error of an update relative to the update.
CLOSE = [
    pytest.param(optax.scale_by_adam(), 0.08, id="adam"),
    pytest.param(optax.scale_by_amsgrad(), 0.08, id="amsgrad"),
    pytest.param(optax.trace(0.9, nesterov=True), 0.025, id="trace"),
    pytest.param(optax.scale_by_rms(), 0.04, id="rms"),
]


@pytest.mark.parametrize(("inner", "bound"), CLOSE)
def test_follows_the_fp32_inner(inner, bound, relaxed):
    exact, _ = follow(relaxed(inner))
    ours, _ = follow(gj.quantized_state(relaxed(inner), min_size=MIN_SIZE))
    for leaf in LARGE:
        error = worst(ours, exact, leaf)
        assert error < bound, leaf
        assert error > 0, "these moments were to be quantized"


def test_lion_flips_few_signs(relaxed):
    exact, _ = follow(relaxed(optax.scale_by_lion()))
    ours, _ = follow(gj.quantized_state(relaxed(optax.scale_by_lion()), min_size=MIN_SIZE))
    for leaf in LARGE:
        flips = [np.mean(a[leaf] != b[leaf]) for a, b in zip(ours, exact, strict=True)]
        assert 0 < np.mean(flips) < 0.015 and max(flips) < 0.04, leaf


def test_small_moments_are_those_of_the_inner_bit_for_bit(relaxed):
    inner = relaxed(optax.scale_by_adam())
    exact, wide = follow(inner, GRADIENTS[:10])
    ours, state = follow(gj.quantized_state(inner, min_size=MIN_SIZE), GRADIENTS[:10])
    for name in SHAPES:
        kept = name not in LARGE
        assert isinstance(state.mu[name], PowerArray) != kept
        assert isinstance(state.nu[name], PowerArray) != kept
        if kept:
            assert_same_bits(
                [(update[name]) for update in ours], [update[name] for update in exact]
            )
            assert_same_bits((state.mu[name], state.nu[name]), (wide.mu[name], wide.nu[name]))


@pytest.mark.parametrize(("min_size", "kept"), [(0, False), (60, False), (61, True)])
def test_min_size_is_the_smallest_size_that_is_quantized(min_size, kept):
    state = gj.quantized_state(optax.trace(0.9), min_size=min_size).init(jnp.ones((6, 10)))
    assert isinstance(state.trace, jax.Array) == kept


def test_the_update_is_computed_before_the_moments_are_rounded(relaxed):
    """Adam's first step has no old moments to have been rounded: it is exact."""
    inner = relaxed(optax.scale_by_adam())
    exact, _ = follow(inner, GRADIENTS[:2])
    ours, _ = follow(gj.quantized_state(inner, min_size=2), GRADIENTS[:2])
    assert_close(ours[0], exact[0], 1e-6)
    assert worst(ours[1:], exact[1:], "big") > 1e-3


@pytest.mark.parametrize("min_size", [0, 1])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
def test_scalars_and_empty_leaves_have_no_blocks(shape, min_size):
    params = {"none": jnp.ones(shape), "w": jnp.ones((4, 8))}
    tx = gj.quantized_state(optax.trace(0.9), min_size=min_size)
    state = tx.init(params)
    update, after = tx.update(params, state)
    assert isinstance(state.trace["none"], jax.Array)
    assert isinstance(state.trace["w"], PowerArray)
    assert update["none"].shape == shape and signature(after) == signature(state)


def test_scale_by_adam8bit_is_a_line_on_top():
    with jax.numpy_dtype_promotion("standard"):  # optax' Adam
        numbers = {"b1": 0.8, "b2": 0.99, "eps": 1e-4}
        form = {"block": 32, "min_size": MIN_SIZE}
        ours = follow(gj.scale_by_adam8bit(**numbers, **form), GRADIENTS[:4])
        by_hand = follow(gj.quantized_state(optax.scale_by_adam(**numbers), **form), GRADIENTS[:4])
    assert_same_bits(ours, by_hand)


# Which map, which form

FIELDS = {
    "adam": (optax.scale_by_adam(), {"mu": True, "nu": False}),
    "nadam": (optax.scale_by_adam(nesterov=True), {"mu": True, "nu": False}),
    "amsgrad": (optax.scale_by_amsgrad(), {"mu": True, "nu": False, "nu_max": False}),
    "lion": (optax.scale_by_lion(), {"mu": True}),
    "trace": (optax.trace(0.9), {"trace": True}),
    "ema": (optax.ema(0.9), {"ema": True}),
    "rms": (optax.scale_by_rms(), {"nu": False}),
    "rss": (optax.scale_by_rss(), {"sum_of_squares": False}),
}


@pytest.mark.parametrize("name", FIELDS)
def test_first_moments_are_signed_and_second_ones_are_not(name):
    inner, fields = FIELDS[name]
    state = jax.eval_shape(gj.quantized_state(inner, min_size=2).init, GRADIENTS[0])
    assert {f for f in state._fields if isinstance(getattr(state, f), dict)} == set(fields)
    for field, signed in fields.items():
        for leaf, moment in getattr(state, field).items():
            assert moment.signed == signed, (field, leaf)


@pytest.mark.parametrize("block", [1, 7, 64, 256, 10_000])
def test_blocks_run_along_the_longer_of_the_last_two_axes(block):
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    tx = gj.quantized_state(optax.trace(0.9), min_size=2, block=block)
    state = jax.eval_shape(tx.init, params)
    for name, moment in state.trace.items():
        shape = SHAPES[name]
        axis = -2 if name == "tall" else -1
        scales = list(shape)
        scales[axis] = -(-shape[axis] // block)
        assert moment.codes.shape == moment.shape == shape
        assert moment.scales.shape == tuple(scales), name
        assert moment.codes.dtype == jnp.uint8 and moment.scales.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_state_is_a_fixed_point_and_nothing_is_traced_again(dtype, relaxed):
    with jax.enable_x64(dtype == "float64"):
        inner = relaxed(optax.chain(optax.scale_by_adam(), optax.trace(0.9)))
        tx, traces = gj.quantized_state(inner, min_size=MIN_SIZE, block=20), []

        @jax.jit
        def step(grad, state):
            traces.append(None)
            return tx.update(grad, state)

        grads = gradients(4, dtype=dtype)
        grads = [grad | {"none": None, "scalar": jnp.asarray(0.5, dtype)} for grad in grads]
        state = tx.init(grads[0])
        before = signature(state)
        for grad in grads:
            update, state = step(grad, state)
            assert signature(state) == before
            assert signature(update) == signature(grad)
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(update))
        assert len(traces) == 1
        abstract = jax.eval_shape(tx.init, grads[0])
        assert jax.tree.structure(abstract) == before[0]


def test_abstract_parameters():
    """As optax's own transformations, and the lens, take them."""
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    tx = gj.quantized_state(optax.scale_by_adam(), min_size=MIN_SIZE)
    assert signature(tx.init(shapes)) == signature(tx.init(GRADIENTS[0]))


def test_moments_that_the_inner_keeps_in_bf16_decode_to_bf16(relaxed):
    inner = relaxed(optax.scale_by_adam(mu_dtype=jnp.bfloat16))
    tx = gj.quantized_state(inner, min_size=2)
    state = tx.init(GRADIENTS[0])
    before = signature(state)
    _, state = jax.jit(tx.update)(GRADIENTS[0], state)
    assert signature(state) == before
    assert state.mu["big"].dtype == jnp.bfloat16 and state.nu["big"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_moments_of_half_precision_gradients_are_fp32(dtype, relaxed):
    """As if the gradients had been widened: the update alone is narrowed."""
    inner = relaxed(optax.scale_by_adam())
    tx = gj.quantized_state(inner, min_size=MIN_SIZE)
    narrow = gradients(5, dtype=dtype)
    wide = [jax.tree.map(lambda g: g.astype(jnp.float32), grad) for grad in narrow]
    ours, state = follow(tx, narrow)
    exact, exact_state = follow(tx, wide)
    assert_close(state, exact_state)
    kept = [{n: s[n] for n in ("small", "w")} for s in (state.nu, exact_state.nu)]
    assert_close(*kept, bound=1e-6)
    assert state.nu["small"].dtype == state.nu["big"].dtype == jnp.float32
    assert_close(ours, [jax.tree.map(lambda u: u.astype(dtype), u) for u in exact], 1e-2)


def test_a_second_moment_decays_under_bf16_gradients(relaxed):
    """0.999 of a bf16 number is the number itself, rounded."""
    tx = gj.quantized_state(relaxed(optax.scale_by_adam(b2=0.999)), min_size=2)
    one = jnp.ones((16, 32), jnp.bfloat16)
    _, state = follow(tx, [one] + [jnp.zeros_like(one)] * 40)
    np.testing.assert_allclose(power.decode(state.nu), 0.001 * 0.999**40, rtol=1e-3)


def test_zero_stays_zero_and_a_positive_second_moment_positive(relaxed):
    """An entry is divided by its root: rounded to zero, it would blow the update up."""
    tx = gj.quantized_state(relaxed(optax.scale_by_rms(decay=0.9, eps=1e-30)), min_size=2)
    rng = np.random.default_rng(0)
    grad = np.exp(rng.uniform(-18, 2, size=(32, 64))).astype(np.float32)  # 17 decades in squares
    grad[:, ::3], grad[5] = 0, 0
    state, step = tx.init(jnp.asarray(grad)), jax.jit(tx.update)
    np.testing.assert_array_equal(power.decode(state.nu), 0)
    for _ in range(30):
        update, state = step(jnp.asarray(grad), state)
        np.testing.assert_array_equal(np.asarray(power.decode(state.nu)) > 0, grad > 0)
        assert np.all(np.isfinite(update))
        assert np.all(np.asarray(update)[grad == 0] == 0)
    # Small entries are rounded up at most, so their steps are too short at most.
    assert np.max(np.abs(update)) < 1.1 / np.sqrt(0.1)


def test_zero_gradients_from_the_start_give_zero_updates(relaxed):
    tx = gj.quantized_state(relaxed(optax.scale_by_adam()), min_size=2)
    zeros = [jax.tree.map(jnp.zeros_like, GRADIENTS[0])] * 3
    updates, state = follow(tx, zeros)
    assert all(
        np.all(leaf == 0) for leaf in jax.tree.leaves((updates, decode((state.mu, state.nu))))
    )


def test_bytes_that_xla_allocates():
    """A byte per entry, and a number per block."""
    shapes = {"w": (256, 512), "tall": (1024, 64), "bias": (512,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    tx = gj.quantized_state(optax.scale_by_adam())
    state = jax.eval_shape(tx.init, params)

    def arguments(fn, *args):
        with jax.numpy_dtype_promotion("standard"):
            return jax.jit(fn).lower(*args).compile().memory_analysis().argument_size_in_bytes

    entries = 256 * 512 + 1024 * 64
    measured = arguments(tx.update, params, state) - 4 * (entries + 512)
    expected = 2 * (entries + entries // 256 * 4 + 512 * 4) + 4
    assert abs(measured - expected) < 200
    plain = optax.scale_by_adam()
    wide = arguments(plain.update, params, jax.eval_shape(plain.init, params))
    assert measured < (wide - 4 * (entries + 512)) / 3.8


# Composition

TRANSPORTS = [gj.transport.align(), gj.transport.reset(second="mean"), gj.transport.rotate()]
MATRICES = gradients(20, {"small": (5,), "stack": (2, 20, 24), "w": (24, 16)})


def lens(inner, transport, **options):
    return gj.low_rank_projection(
        inner, 8, refresh=5, transport=transport, projector=gj.projectors.svd(),
        axes=gj.MatrixAxes(-2, -1), **options,
    )  # fmt: skip


@pytest.mark.parametrize("transport", TRANSPORTS, ids=repr)
def test_inside_a_lens_every_transport_carries_the_codes(transport, relaxed):
    """The bases do not depend on the moments, so both runs move through the same subspaces."""
    adam, grads = relaxed(optax.scale_by_adam()), MATRICES
    exact, wide = follow(lens(adam, transport), grads)
    tx = lens(gj.quantized_state(adam, min_size=100, block=16), transport)
    ours, state = follow(tx, grads)
    assert_close(state.projectors, wide.projectors)
    assert_same_bits(state.refresh_state, wide.refresh_state)
    assert int(np.min(state.refresh_state.refreshes["stack"])) == 4
    assert signature(state) == signature(jax.eval_shape(tx.init, grads[0]))
    for leaf in ("stack", "w"):
        assert isinstance(state.inner_state.mu[leaf], PowerArray)
        assert 0 < worst(ours, exact, leaf) < 0.05, leaf
    assert_close(ours[-1]["small"], exact[-1]["small"], 1e-5)


@pytest.mark.parametrize("transport", [gj.transport.reset(), gj.transport.rotate()], ids=repr)
def test_transport_leaves_the_bits_of_matrices_that_did_not_move(transport, relaxed):
    rng = np.random.default_rng(1)
    tx = gj.quantized_state(relaxed(optax.scale_by_adam()), min_size=2, block=16)
    params = jnp.zeros((3, 20, 8))
    grads = [jnp.asarray(rng.normal(size=params.shape), jnp.float32) for _ in range(4)]
    _, state = follow(tx, grads)
    bases = np.linalg.qr(rng.normal(size=(2, 3, 30, 8)))[0].astype(np.float32)
    moved = jnp.asarray([False, True, False])
    old = jnp.asarray(bases[0])
    new = jnp.where(moved[:, None, None], bases[1], old)
    move = BasisChange(old, new, moved, jnp.zeros(3, bool))
    carried = jax.jit(lambda s: transport.carry(s, jax.tree.structure(params), [move]))(state)
    assert signature(carried) == signature(state)
    for before, after in ((state.mu, carried.mu), (state.nu, carried.nu)):
        for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(one[0], other[0])
            np.testing.assert_array_equal(one[2], other[2])
            assert np.any(one[1] != other[1])


def test_reset_forgets_the_codes(relaxed):
    tx = lens(gj.quantized_state(relaxed(optax.trace(0.9)), min_size=2), gj.transport.reset())
    grads = MATRICES[:6]  # the last step refreshes
    ours, _ = follow(tx, grads)
    alone, _ = follow(lens(optax.identity(), gj.transport.reset()), grads)
    for leaf in ("stack", "w"):
        np.testing.assert_allclose(ours[-1][leaf], alone[-1][leaf], rtol=1e-4, atol=1e-5)


def test_partition_and_masks_around_and_inside(relaxed):
    adam, lion = relaxed(optax.scale_by_adam()), relaxed(optax.scale_by_lion())
    labels = {name: "adam" if name in ("big", "small") else "lion" for name in SHAPES}
    grads = GRADIENTS[:6]

    def eight(inner):
        return gj.quantized_state(inner, min_size=MIN_SIZE)

    first, _ = follow(eight(adam), grads)
    second, _ = follow(eight(lion), grads)
    outside = optax.partition({"adam": eight(adam), "lion": eight(lion)}, labels)
    inside = eight(optax.partition({"adam": adam, "lion": lion}, labels))
    for tx in (outside, inside):
        updates, state = follow(tx, grads)
        assert signature(state) == signature(jax.eval_shape(tx.init, grads[0]))
        for update, one, two in zip(updates, first, second, strict=True):
            assert_close(update, {n: (one if labels[n] == "adam" else two)[n] for n in SHAPES})
    mask = {name: label == "adam" for name, label in labels.items()}
    for tx in (optax.masked(eight(adam), mask), eight(optax.masked(adam, mask))):
        updates, _ = follow(tx, grads)
        for update, grad, one in zip(updates, grads, first, strict=True):
            assert_close(update, {n: (one if mask[n] else grad)[n] for n in SHAPES})


def test_injected_numbers_are_the_numbers():
    inject = optax.inject_hyperparams(gj.scale_by_adam8bit, static_args=("block", "min_size"))
    with jax.numpy_dtype_promotion("standard"):
        ours, state = follow(inject(b1=0.8, b2=0.99, min_size=MIN_SIZE), GRADIENTS[:4])
        plain, _ = follow(gj.scale_by_adam8bit(0.8, 0.99, min_size=MIN_SIZE), GRADIENTS[:4])
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert float(state.hyperparams["b2"]) == pytest.approx(0.99)


def test_apply_if_finite_around_it(relaxed):
    tx = gj.quantized_state(relaxed(optax.trace(0.9)), min_size=MIN_SIZE)
    guarded = optax.apply_if_finite(tx, 10)
    grads = GRADIENTS[:4]
    bad = grads[1] | {"big": grads[1]["big"].at[0, 0].set(jnp.nan)}
    updates, state = follow(guarded, [*grads[:2], bad, *grads[2:]])
    expected, plain = follow(tx, grads)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates[2]))
    assert_close([*updates[:2], *updates[3:]], expected)
    assert_close(state.inner_state, plain)


def test_a_gradient_that_is_not_finite_spoils_its_block_alone(relaxed):
    tx = gj.quantized_state(relaxed(optax.trace(0.9)), min_size=2, block=16)
    grad = GRADIENTS[0]["big"].at[3, 20].set(jnp.nan)
    _, state = tx.update(grad, tx.init(grad))
    bad = np.zeros((48, 64), bool)
    bad[3, 16:32] = True
    np.testing.assert_array_equal(np.isnan(power.decode(state.trace)), bad)


# Parameters of other kinds


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_parameters_stored_as_codes(dtype, relaxed):
    """A QuantizedArray is one floating leaf, for `init`, `update` and weight decay."""
    wide = {name: jnp.asarray(leaf, dtype) for name, leaf in gradients(1, seed=5)[0].items()}
    params = gj.quant.quantize_params(wide, targets="big|tall", block=32)
    decoded = gj.quant.dequantize_params(params)
    assert isinstance(params["tall"], gj.quant.QuantizedArray) and decoded["big"].dtype == dtype
    grads = gradients(4, dtype=dtype)
    inner = relaxed(optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1)))
    tx = gj.quantized_state(inner, min_size=MIN_SIZE)
    ours, state = follow(tx, grads, params)
    expected, _ = follow(tx, grads, decoded)
    assert_close(ours, expected)
    assert signature(state) == signature(jax.eval_shape(tx.init, params))
    behind = optax.chain(
        gj.quantized_state(relaxed(optax.scale_by_adam()), min_size=MIN_SIZE),
        optax.add_decayed_weights(0.1),
    )
    chained, _ = follow(behind, grads, params)
    bare, _ = follow(gj.quantized_state(relaxed(optax.scale_by_adam()), min_size=MIN_SIZE), grads)
    for name in SHAPES:
        shift = np.asarray(0.1 * decoded[name].astype(jnp.float32))
        difference = (chained[-1][name] - bare[-1][name]).astype(jnp.float32)
        atol = 1e-6 if dtype == "float32" else 3e-2 * np.max(np.abs(bare[-1][name]))
        np.testing.assert_allclose(difference, shift, atol=max(atol, 1e-6), rtol=2e-2)


def test_partition_of_parameters_stored_as_codes(relaxed):
    """Labels made by mapping over the parameters have one for every part of a code array."""
    params = gj.quant.quantize_params({"a": GRADIENTS[0]["big"], "b": GRADIENTS[0]["tall"]})
    grads = [{"a": g["big"], "b": g["tall"]} for g in GRADIENTS[:3]]
    adam = gj.quantized_state(relaxed(optax.scale_by_adam()), min_size=2)

    def labels(tree):
        return {name: jax.tree.map(lambda _, n=name: n, tree[name]) for name in tree}

    tx = optax.partition({"a": adam, "b": optax.scale(2.0)}, labels)
    updates, state = follow(tx, grads, params)
    assert signature(state) == signature(jax.eval_shape(tx.init, params))
    alone, _ = follow(adam, [{"a": g["a"]} for g in grads])
    for update, grad, one in zip(updates, grads, alone, strict=True):
        assert_close(update, {"a": one["a"], "b": 2.0 * grad["b"]})


def test_linen_boxes_are_kept(relaxed):
    tx = gj.quantized_state(relaxed(optax.scale_by_adam()), min_size=MIN_SIZE)
    grads = GRADIENTS[:3]
    boxed = [
        {name: nn.Partitioned(leaf, (None,) * leaf.ndim) for name, leaf in grad.items()}
        for grad in grads
    ]
    updates, state = follow(tx, boxed, boxed[0])
    expected, plain = follow(tx, grads, grads[0])
    assert jax.tree.structure(updates[0]) == jax.tree.structure(boxed[0])
    assert_close(jax.tree.leaves(updates), jax.tree.leaves(expected))
    assert_close(jax.tree.leaves(state), jax.tree.leaves(plain))
    assert isinstance(state.mu["big"], PowerArray)


def test_nnx_optimizer():
    with jax.numpy_dtype_promotion("standard"), nnx.use_eager_sharding(False):
        model = nnx.Linear(24, 32, rngs=nnx.Rngs(0))
        tx = optax.chain(
            gj.quantized_state(optax.scale_by_adam(), min_size=500), optax.scale(-0.02)
        )
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 24)), jnp.float32)

        @nnx.jit
        def step(model, optimizer):
            loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1.0) ** 2))(model)
            optimizer.update(model, grads)
            return loss

        before = jax.tree.structure(nnx.state(optimizer))
        losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < 0.7 * losses[0]
    assert jax.tree.structure(nnx.state(optimizer)) == before
    stored = [x.dtype for x in jax.tree.leaves(nnx.state(optimizer)) if x.shape == (24, 32)]
    assert stored.count(jnp.uint8) == 2


# The registry


@pytest.mark.parametrize(
    "inner",
    [optax.scale_by_factored_rms(), optax.identity(), optax.scale(2.0), optax.scale_by_adadelta()],
    ids=["factored rms", "identity", "scale", "adadelta"],
)
def test_an_inner_without_known_moments_is_refused_with_the_remedy(inner):
    with pytest.raises(TypeError, match="register_moment"):
        gj.quantized_state(inner).init({"w": jnp.ones((4, 4))})


@pytest.mark.parametrize("params", [{}, {"w": None}, optax.MaskedNode()], ids=str)
@pytest.mark.parametrize("transport", [gj.transport.align(), gj.transport.rotate()], ids=repr)
def test_a_tree_without_parameters_is_no_error(params, transport):
    adam8bit = gj.scale_by_adam8bit()
    for tx in (adam8bit, lens(adam8bit, transport)):
        state = tx.init(params)
        updates, after = tx.update(params, state, params)
        assert updates == params and signature(after) == signature(state)


def test_map_params_takes_no_codes_for_parameters():
    """What is like no parameter goes to `transform_non_params`: a spec that replicates, say."""
    specs = {name: jax.sharding.PartitionSpec(*[None] * len(s)) for name, s in SHAPES.items()}
    tx = optax.chain(gj.scale_by_adam8bit(min_size=MIN_SIZE), optax.trace(0.9))
    state, replicated = tx.init(GRADIENTS[0]), jax.sharding.PartitionSpec()
    mapped = optax.tree_map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: replicated
    )
    assert mapped == (optax.ScaleByAdamState(*[replicated] * 3), optax.TraceState(specs))


class Pair(NamedTuple):
    """Made up for this file: optax has no such state."""

    steps: jax.Array
    direction: optax.Updates
    energy: optax.Updates


def pair():
    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Pair(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(updates, state, params=None):
        del params
        direction = jax.tree.map(lambda d, g: 0.5 * d + g, state.direction, updates)
        energy = jax.tree.map(lambda e, g: 0.5 * e + g * g, state.energy, updates)
        step = jax.tree.map(lambda d, e: d / jnp.sqrt(e + 1e-3), direction, energy)
        return step, Pair(state.steps + 1, direction, energy)

    return optax.GradientTransformation(init, update)


def test_a_state_of_ones_own_can_be_registered(monkeypatch):
    from galore_jax.transport import moments

    monkeypatch.setattr(moments, "_REGISTRY", dict(moments._REGISTRY))
    with pytest.raises(TypeError, match="register_moment"):
        gj.quantized_state(pair()).init(GRADIENTS[0])
    gj.transport.register_moment(Pair, first="direction", second="energy")
    exact, _ = follow(pair(), GRADIENTS[:20])
    ours, state = follow(gj.quantized_state(pair(), min_size=MIN_SIZE), GRADIENTS[:20])
    assert state.direction["big"].signed and not state.energy["big"].signed
    assert isinstance(state.energy["small"], jax.Array) and int(state.steps) == 20
    for leaf in LARGE:
        assert 0 < worst(ours, exact, leaf) < 0.1
    rotated, _ = follow(
        lens(gj.quantized_state(pair(), min_size=100), gj.transport.rotate()), MATRICES[:7]
    )
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(rotated))


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"block": 0}, ValueError, "block"),
        ({"block": -1}, ValueError, "block"),
        ({"block": 2.5}, TypeError, "block"),
        ({"block": True}, TypeError, "block"),
    ],
    ids=str,
)
def test_bad_numbers_are_refused_when_it_is_built(options, error, name):
    with pytest.raises(error, match=name):
        gj.quantized_state(optax.trace(0.9), **options)


def test_a_difference_of_moments_is_refused():
    """Rounding makes nu - mu**2 negative, and its root NaN."""
    with pytest.raises(TypeError, match="scale_by_rms"):
        gj.quantized_state(optax.scale_by_stddev()).init({"w": jnp.ones((64, 64))})


def test_a_state_with_another_block_is_refused():
    params = {"w": jnp.ones((64, 128))}
    state = gj.quantized_state(optax.trace(0.9)).init(params)
    with pytest.raises(ValueError, match=r"'w'.*in blocks of 256"):
        gj.quantized_state(optax.trace(0.9), block=64).update(params, state)
