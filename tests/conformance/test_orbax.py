"""Save, restore, continue: bit for bit."""

from __future__ import annotations

import functools
import warnings

import conformance_cases as cc
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import galore_jax as gj
from galore_jax.leaves import is_one_leaf
from galore_jax.quant import power

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import orbax.checkpoint as ocp
    from orbax.checkpoint import v1

pytestmark = pytest.mark.filterwarnings("ignore")  # orbax' own

BY_NAME = {case.name: case for case in cc.CASES}
SOME = [
    *(
        BY_NAME[name]
        for name in (
            "galore_adafactor",
            "keep-svd-input",
            "rotate-randomized",
            "staggered-rotate-bf16",
            "rotate-adam8bit",
        )
    ),
    *cc.QUANTIZED_BASES,
]


def abstract(tree):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def through_v0(directory, state, target):
    with ocp.CheckpointManager(directory) as manager:
        manager.save(0, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        return manager.restore(0, args=ocp.args.StandardRestore(abstract(target)))


def through_v1(directory, state, target):
    with v1.training.Checkpointer(directory) as checkpointer:
        checkpointer.save_checkpointables(0, {"state": state})
    with v1.training.Checkpointer(directory) as checkpointer:
        return checkpointer.load_checkpointables(0, {"state": abstract(target)})["state"]


both = pytest.mark.parametrize("through", [through_v0, through_v1])


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@both
@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.sampled(3)
def test_save_restore_continue_is_exact(through, case, tmp_path):
    run, middle = cc.run(case), 2  # a refresh comes after this one
    state = through(tmp_path / "checkpoint", run.states[middle], run.states[0])
    assert_same_bits(state, run.states[middle])
    with case.promotion:
        for step in range(middle, cc.STEPS):
            grads = cc.gradients(case.integers)[step]
            update, state = run.step(grads, state, run.params)
            assert_same_bits(update, run.updates[step])
    assert_same_bits(state, run.states[-1])


ADAM = cc.relaxed(optax.scale_by_adam())
PARAMS = {"b": jnp.ones(9), "w": jnp.ones((6, 9))}
GRADS = [
    jax.tree.map(lambda p, s=seed: jax.random.normal(jax.random.key(s), p.shape), PARAMS)
    for seed in range(4)
]
WRITTEN = {
    "rank": 3, "refresh": 2, "projector": gj.projectors.svd(), "side": "short", "scale": 1.0,
}  # fmt: skip


def make(**changes):
    options = WRITTEN | changes
    return gj.low_rank_projection(ADAM, options.pop("rank"), **options)


def written():
    tx, state = make(), make().init(PARAMS)
    for grads in GRADS[:3]:
        _, state = tx.update(grads, state)
    return state


@pytest.mark.parametrize(
    "changes",
    [
        {"refresh": 3},
        {"refresh": gj.refresh.staggered(5)},
        {"scale": 0.5},
        {"transport": gj.transport.keep()},
        {"transport": gj.transport.rotate()},
        {"projector": gj.projectors.randomized_svd()},
        {"seed": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("restored", [True, False])
@pytest.mark.sampled(3)
def test_what_fixes_no_shape_may_change(changes, restored, tmp_path):
    tx, state = make(**changes), written()
    if restored:
        state = through_v1(tmp_path / "checkpoint", state, tx.init(PARAMS))
    update, after = jax.jit(tx.update)(GRADS[3], state)
    if restored:
        assert cc.signature(after) == cc.signature(state)
    kept, _ = make().update(GRADS[3], written())
    factor = changes.get("scale", 1.0)  # step 3 has no refresh: everything else is as it was
    np.testing.assert_allclose(update["w"], factor * kept["w"], atol=1e-6)
    np.testing.assert_allclose(update["b"], kept["b"], atol=1e-6)
    assert after.config == tx.init(PARAMS).config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 2),
        ("rank", 0.5),
        ("side", "long"),
        ("side", "output"),
        ("codec", gj.codecs.cast("bfloat16")),
        ("codec", gj.codecs.int4()),
        ("state_dtype", jnp.bfloat16),
    ],
)
def test_what_fixes_the_storage_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        make(**{field: value}).update(GRADS[3], written())


@both
@pytest.mark.parametrize(
    ("field", "value"), [("rank", 2), ("side", "long"), ("codec", gj.codecs.cast("bfloat16"))]
)
@pytest.mark.sampled(2)
def test_a_checkpoint_of_other_storage_is_refused_by_name(through, field, value, tmp_path):
    """Where the target is the state that was written, with its configuration."""
    state = through(tmp_path / "checkpoint", written(), written())
    with pytest.raises(ValueError, match=field):
        make(**{field: value}).update(GRADS[3], state)


def test_codes_of_another_width_or_group_are_refused_by_name():
    """Two groups may have arrays of the same shapes: the configuration tells them apart."""
    with_codes = make(codec=gj.codecs.int4())
    _, state = with_codes.update(GRADS[0], with_codes.init(PARAMS))
    for codec in (gj.codecs.int8(), gj.codecs.int4(block=16), gj.codecs.identity()):
        with pytest.raises(ValueError, match="codec"):
            make(codec=codec).update(GRADS[1], state)


@both
def test_weights_in_codes_go_through_a_checkpoint(through, tmp_path):
    params = gj.quant.quantize_params(PARAMS, block=4)
    assert isinstance(params["w"], gj.quant.QuantizedArray)
    restored = through(tmp_path / "checkpoint", params, params)
    assert_same_bits(restored, params)
    key = jax.random.key(1)
    assert_same_bits(
        gj.apply_updates(restored, GRADS[0], key=key), gj.apply_updates(params, GRADS[0], key=key)
    )


def test_the_memory_of_adaptive_goes_through_a_checkpoint(tmp_path):
    """Gaps, counts, and similarities, of which there are fewer than `patience` yet."""
    policy = gj.refresh.adaptive(1, patience=2, threshold=0.1, max_gap=8)
    tx = make(refresh=policy, codec=gj.codecs.int4(block=4))
    state, step = tx.init(PARAMS), cc.jit(tx.update)
    for grads in GRADS[:2]:
        _, state = step(grads, state)
    restored = through_v1(tmp_path / "checkpoint", state, tx.init(PARAMS))
    assert_same_bits(restored, state)
    assert (restored.refresh_state.memory["w"].similarities >= 0).tolist() == [False, True]
    for grads in (GRADS * 3)[2:]:
        update, state = step(grads, state)
        again, restored = step(grads, restored)
        assert_same_bits(again, update)
    assert_same_bits(restored, state)
    assert int(state.refresh_state.memory["w"].gap) > 1


@pytest.mark.xfail(strict=True, reason="the configuration is static and no part of a checkpoint")
@both
def test_another_side_of_a_square_matrix_is_noticed_on_restore(through, tmp_path):
    square = {"w": jax.random.normal(jax.random.key(0), (8, 8))}
    before, after = make(side="input"), make(side="output")
    _, state = before.update(square, before.init(square))
    with pytest.raises(ValueError, match="side"):
        after.update(square, through(tmp_path / "checkpoint", state, after.init(square)))


def test_restored_without_a_target_it_is_plain_containers(tmp_path):
    """Nothing in the state needs our classes to be readable: the arrays are all there."""
    state = written()
    with v1.training.Checkpointer(tmp_path / "checkpoint") as checkpointer:
        checkpointer.save_checkpointables(0, {"state": state})
    with v1.training.Checkpointer(tmp_path / "checkpoint") as checkpointer:
        plain = checkpointer.load_checkpointables(0)["state"]
    np.testing.assert_array_equal(plain["projectors"]["w"], state.projectors["w"])
    assert int(plain["count"]) == 3


SHARDED = {"norm": (16,), "stack": (2, 16, 24), "up": (32, 48)}
SPECS = {"norm": P("data"), "stack": P(None, "data", "model"), "up": P("model", "data")}
IN_FEW_BITS = gj.low_rank_projection(
    gj.quantized_state(ADAM, block=8, min_size=1),
    4,
    refresh=2,
    axes=gj.MatrixAxes(),
    codec=gj.codecs.int4(block=8),
)
EXACT = gj.low_rank_projection(ADAM, 4, refresh=2, axes=gj.MatrixAxes())


def on_mesh(shape):
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}


def weights(few_bits):
    params = sharded_draw(0)
    return gj.quant.quantize_params(params, block=8) if few_bits else params


def sharded_draw(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHARDED))
    return {
        name: jax.random.normal(key, shape) / 8
        for key, (name, shape) in zip(keys, SHARDED.items(), strict=True)
    }


def layout(tx, params, sharding):
    """Shardings of a training state; None: all of it on one device."""
    if sharding is None:
        shapes = jax.eval_shape(lambda p: (p, tx.init(p)), params)
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[5]), shapes)
    return (
        gj.quant.params_sharding(params, sharding),
        gj.state_sharding(tx, params, sharding),
    )


def continued(tx, training, shardings, steps):
    @functools.partial(jax.jit, out_shardings=shardings)
    def step(training, gradients, key):
        params, state = training
        updates, state = tx.update(gradients, state)
        updates = jax.tree.map(lambda u: -0.01 * u, updates)
        return gj.apply_updates(params, updates, key=key), state

    for number in steps:
        training = step(training, sharded_draw(number), jax.random.key(number))
    return training


@pytest.fixture(scope="module", params=[True, False], ids=["few bits", "fp32"])
def saved(request, tmp_path_factory):
    """Three steps on a 4x2 mesh, a checkpoint, and where three more lead."""
    tx = IN_FEW_BITS if request.param else EXACT
    params = weights(request.param)
    shardings = layout(tx, params, on_mesh((4, 2)))
    start = jax.device_put(params, shardings[0]), gj.init_sharded(tx, params, on_mesh((4, 2)))
    middle = continued(tx, start, shardings, range(1, 4))
    directory = tmp_path_factory.mktemp("mesh") / "checkpoint"
    with v1.training.Checkpointer(directory) as checkpointer:
        checkpointer.save_checkpointables(0, {"training": middle})
    end = continued(tx, middle, shardings, range(4, 7))
    return tx, params, directory, jax.device_get(middle), jax.device_get(end)


@pytest.mark.parametrize("shape", [(2, 4), (8, 1), None], ids=str)
@pytest.mark.sampled(2)
def test_a_state_goes_to_another_mesh(saved, shape):
    tx, params, directory, middle, end = saved
    shardings = layout(tx, params, shape and on_mesh(shape))
    template = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda p: (p, tx.init(p)), params),
        shardings,
    )
    with v1.training.Checkpointer(directory) as checkpointer:
        restored = checkpointer.load_checkpointables(0, {"training": template})["training"]
    assert_same_bits(restored, middle)
    for array, sharding in zip(*map(jax.tree.leaves, (restored, shardings)), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    ours = jax.device_get(continued(tx, restored, shardings, range(4, 7)))
    for one, other in zip(*map(jax.tree.leaves, map(decoded, (ours, end))), strict=True):
        # Sums are taken in another order; here and there a code tips.
        error = np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-6)
        assert error < (1e-3 if tx is IN_FEW_BITS else 1e-5)


def decoded(training):
    """Weights and moments as numbers."""
    params, state = training
    moments = state.inner_state.mu, state.inner_state.nu
    return jax.tree.map(
        lambda x: np.asarray(
            power.decode(x) if isinstance(x, gj.quant.PowerArray) else gj.quant.dequantize(x)
        ),
        (params, moments),
        is_leaf=is_one_leaf,
    )
