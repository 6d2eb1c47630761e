"""Sharded states: the same numbers as on one device, no gathered gradient, the promised bytes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_jax as gj
from galore_jax import meshes

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction

SHAPES = {
    "embed": (64, 32),
    "tall": (96, 32),
    "wide": (32, 96),
    "square": (48, 48),
    "stack": (4, 32, 64),
    "norm": (32,),
}
SPECS = {
    "fsdp": {
        "embed": P("data"),
        "tall": P("data"),
        "wide": P(None, "data"),
        "square": P("data"),
        "stack": P(None, "data", None),
        "norm": P(),
    },
    "tensor": {
        "embed": P(None, "model"),
        "tall": P(None, "model"),
        "wide": P("model"),
        "square": P(None, "model"),
        "stack": P(None, None, "model"),
        "norm": P(),
    },
    "both": {
        "embed": P("data", "model"),
        "tall": P("data", "model"),
        "wide": P("model", "data"),
        "square": P("data", "model"),
        "stack": P(None, "model", "data"),
        "norm": P("data"),
    },
    "replicated": dict.fromkeys(SHAPES, P()),
}
LENS = {"rank": 8, "axes": gj.MatrixAxes()}
SMALL_MOMENTS = {"min_size": 64, "block": 16}


def lens(inner, **options):
    return gj.low_rank_projection(inner, **LENS, refresh=5, **options)


OPTIMIZERS = {
    "sgd": gj.galore_sgd(1e-2, **LENS, update_proj_gap=5),
    "adamw, long": gj.galore_adamw(1e-2, **LENS, update_proj_gap=5, side="long", weight_decay=0.1),
    "q-galore": lens(
        gj.quantized_state(optax.scale_by_adam(), **SMALL_MOMENTS), codec=gj.codecs.int4(block=16)
    ),
}
EVERY_KIND = OPTIMIZERS | {
    "galore": gj.galore(1e-2, **LENS),
    "adafactor": gj.galore_adafactor(1e-2, **LENS),
    "lion": gj.galore_lion(1e-3, **LENS),
    "adamw8bit": gj.galore_adamw8bit(1e-2, **LENS),
    "q_galore_adamw8bit": gj.q_galore_adamw8bit(1e-2, **LENS),
    "optax.adamw": optax.adamw(1e-3),
    "optax.adafactor": optax.adafactor(1e-3),
    "adam8bit": gj.quantized_state(optax.scale_by_adam(), **SMALL_MOMENTS),
    "partition": optax.partition(
        {"low": gj.galore_adamw(1e-2, **LENS), "full": optax.adam(1e-3)},
        {k: "full" if k in ("embed", "norm") else "low" for k in SHAPES},
    ),
    "masked": optax.masked(gj.galore_lion(1e-3, **LENS), {k: k != "norm" for k in SHAPES}),
    "wrapped": optax.apply_if_finite(
        optax.MultiSteps(
            optax.inject_hyperparams(gj.galore_adamw, static_args=gj.STATIC_ARGS)(1e-2, **LENS), 2
        ).gradient_transformation(),
        max_consecutive_errors=3,
    ),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), gj.galore_sgd(1e-2, **LENS)),
}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape) * np.linspace(1, 0.1, shape[-1]), jnp.float32)
        for name, shape in SHAPES.items()
    }


def on_mesh(specs, shape=(4, 2), kind=AxisType.Auto):
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind,) * 2)
    return {name: NamedSharding(mesh, spec) for name, spec in SPECS[specs].items()}


def train(tx, sharding=None, *, steps=12, **options):
    params = draw(0)
    if sharding is None:
        state, update = tx.init(params), jax.jit(tx.update)
    else:
        params = jax.device_put(params, sharding)
        shardings = gj.state_sharding(tx, params, sharding, **options)
        state = gj.init_sharded(tx, params, sharding, **options)
        update = jax.jit(tx.update, out_shardings=(sharding, shardings))
    for step in range(steps):
        gradients = draw(step + 1)
        if sharding is not None:
            gradients = jax.device_put(gradients, sharding)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state, update


@pytest.fixture(scope="module")
def alone():
    """Parameters after a run on one device."""
    with jax.numpy_dtype_promotion("standard"):
        return {name: jax.device_get(train(tx)[0]) for name, tx in OPTIMIZERS.items()}


CASES = [
    ("fsdp", (8, 1), AxisType.Auto),
    ("tensor", (4, 2), AxisType.Auto),
    ("both", (4, 2), AxisType.Auto),
    ("replicated", (4, 2), AxisType.Auto),
    ("both", (2, 4), AxisType.Explicit),
]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("specs, shape, kind", CASES)
def test_the_same_numbers_as_on_one_device(alone, specs, shape, kind, name):
    params, state, _ = train(OPTIMIZERS[name], on_mesh(specs, shape, kind))
    # A code may tip where a sum is taken in another order.
    tolerance = 1e-3 if name == "q-galore" else 1e-5
    for leaf, expected in alone[name].items():
        error = np.linalg.norm(jax.device_get(params[leaf]) - expected) / np.linalg.norm(expected)
        assert error < tolerance, leaf
    assert jax.tree.structure(state) == jax.tree.structure(OPTIMIZERS[name].init(draw(0)))


@pytest.mark.parametrize("tx", EVERY_KIND.values(), ids=EVERY_KIND)
@pytest.mark.parametrize("spread", [False, True])
def test_there_is_a_sharding_for_every_array(tx, spread):
    params, sharding = draw(0), on_mesh("both")
    shardings = gj.state_sharding(tx, params, sharding, spread=spread)
    state = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    for array, spec in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert spec.shard_shape(array.shape) is not None  # raises where it does not divide


def test_specs_follow_from_those_of_the_parameters():
    sharding = on_mesh("both")
    state = gj.state_sharding(gj.galore_adamw(1e-2, **LENS), draw(0), sharding)[0]
    assert tuple(state.inner_state.mu["embed"].spec) == ("data", "model")  # not projected
    # tall [96, 32] projects its 32 outputs: rows are kept.
    assert tuple(state.projectors["tall"].spec) == ("model", None)
    assert tuple(state.inner_state.nu["tall"].spec) == ("data", None)
    # stack [4, 32, 64] projects its 32 inputs.
    assert tuple(state.projectors["stack"].spec) == (None, "model", None)
    assert tuple(state.inner_state.mu["stack"].spec) == (None, "data", None)
    assert state.count.spec == P() and state.refresh_state.due["stack"].spec == P()


def test_spreading_uses_the_axis_of_the_projected_side():
    sharding = on_mesh("tensor")  # tall: the projected axis is sharded
    tx = gj.galore_adamw(1e-2, **LENS)
    mu = gj.state_sharding(tx, draw(0), sharding)[0].inner_state.mu
    assert tuple(mu["tall"].spec) == (None, None)
    mu = gj.state_sharding(tx, draw(0), sharding, spread=True)[0].inner_state.mu
    assert tuple(mu["tall"].spec) == ("model", None)


def test_an_axis_that_the_mesh_does_not_divide_is_replicated():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.ones((64, 24))}  # three blocks along the first axis
    tx = gj.quantized_state(optax.scale_by_adam(), min_size=1, block=24)
    state = gj.state_sharding(tx, params, {"w": NamedSharding(mesh, P("data"))})
    assert tuple(state.mu["w"].codes.spec) == ("data", None)
    assert tuple(state.mu["w"].scales.spec) == (None, None)


def test_state_memory_is_divided():
    sharding = on_mesh("fsdp", (8, 1))
    tx = gj.galore_adamw(1e-2, **LENS)
    state = gj.init_sharded(tx, jax.device_put(draw(0), sharding), sharding)
    for name in ("embed", "tall", "wide"):  # kept axes are sharded
        mu = state[0].inner_state.mu[name]
        assert math.prod(mu.sharding.shard_shape(mu.shape)) * 8 == mu.size


def collectives(text):
    """Shapes of everything that is gathered or reduced in a compiled program."""
    pattern = r"= \(?(?:[a-z0-9]+\[[\d,]*\][^=]*?) (?:all-gather|all-reduce)"
    for match in re.finditer(pattern, text):
        for dims in re.findall(r"\[([\d,]*)\]", match.group(0)):
            yield math.prod(int(d) for d in dims.split(",") if d)


def largest_collective(projector, specs):
    """Of an update of matrices [512, 256] and [256, 768], refresh included, at rank 16."""
    shapes = {"w": (512, 256), "v": (256, 768)}
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = {"fsdp": P("data"), "both": P("data", "model"), "tensor": P(None, "model")}[specs]
    sharding = dict.fromkeys(shapes, NamedSharding(mesh, spec))
    tx = gj.galore_adamw(1e-2, rank=16, projector=projector)
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    states = gj.state_sharding(tx, params, sharding)
    update = jax.jit(
        tx.update, in_shardings=(sharding, states, sharding), out_shardings=(sharding, states)
    )
    text = update.lower(params, jax.eval_shape(tx.init, params), params).compile().as_text()
    return max(collectives(text))


@pytest.mark.parametrize(
    "projector", [gj.projectors.randomized_svd(), gj.projectors.subspace_iteration()], ids=repr
)
@pytest.mark.parametrize("specs", ["fsdp", "both", "tensor"])
def test_no_collective_has_the_size_of_a_gradient(projector, specs):
    assert 0 < largest_collective(projector, specs) <= 768 * 16  # a sketch


def test_a_full_factorization_gathers_the_gradient_and_is_seen_to():
    assert largest_collective(gj.projectors.svd(), "both") >= 512 * 256


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_int8_weights_on_a_mesh(kind):
    sharding = on_mesh("both", kind=kind)
    tx = gj.q_galore_adamw8bit(1e-2, **LENS)
    weights = gj.quant.quantize_params(draw(0))
    state = gj.init_sharded(tx, weights, sharding)
    gradients = jax.device_put(draw(1), sharding)
    updates, _ = jax.jit(tx.update)(gradients, state)
    expected, _ = jax.jit(tx.update)(draw(1), tx.init(draw(0)))
    for name in SHAPES:
        np.testing.assert_allclose(jax.device_get(updates[name]), expected[name], atol=1e-4)


def test_errors_name_the_leaf():
    sharding = on_mesh("fsdp")
    tx = gj.galore_adamw(1e-2, **LENS)
    with pytest.raises(ValueError, match="params_sharding"):
        gj.state_sharding(tx, draw(0), {"embed": sharding["embed"]})
    with pytest.raises(TypeError, match="'tall'"):
        gj.state_sharding(tx, draw(0), sharding | {"tall": P("data")})
    odd = draw(0) | {"tall": jnp.ones((97, 32))}
    with pytest.raises(ValueError, match=r"'tall' of shape \(97, 32\)"):
        gj.state_sharding(tx, odd, sharding)


@pytest.mark.parametrize("spec", [P("data", None), P(None, "data")], ids=str)
def test_int8_weights_are_used_and_written_on_an_explicit_mesh(spec):
    mesh = jax.make_mesh((8,), ("data",))
    weight = draw(0)["wide"]
    on_one_device = gj.quant.quantize(weight, block=32)
    parts = NamedSharding(mesh, spec)
    stored = jax.tree.map(
        lambda x: jax.device_put(x, parts if x.shape == weight.shape else NamedSharding(mesh, P())),
        on_one_device,
    )
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(
            jax.device_get(gj.quant.dequantize(stored)), gj.quant.dequantize(on_one_device)
        )
        update = jax.device_put(0.1 * weight, parts)
        new = gj.apply_updates({"w": stored}, {"w": update}, key=None)["w"]
    assert new.codes.sharding.spec == stored.codes.sharding.spec
    expected = gj.apply_updates({"w": on_one_device}, {"w": 0.1 * weight}, key=None)["w"]
    assert np.max(np.abs(jax.device_get(new.codes).astype(int) - expected.codes)) <= 1


def test_containers_are_not_mistaken_for_parameter_trees():
    """A chain state is a tuple, and so may the parameters be; a partition has a dict, too."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rows, columns = NamedSharding(mesh, P("x", None)), NamedSharding(mesh, P(None, "x"))
    params = (jnp.ones((8, 8)), jnp.ones((8, 8)))
    adam = gj.state_sharding(optax.adam(1e-3), params, (rows, columns))[0]
    assert (adam.mu[0].spec, adam.mu[1].spec) == (rows.spec, columns.spec)
    tx = optax.partition({"a": optax.adam(1.0), "b": optax.adam(1.0)}, {"a": "b", "b": "a"})
    params = {"a": params[0], "b": params[1]}
    state = gj.state_sharding(tx, params, {"a": rows, "b": columns})
    assert state.inner_states["b"].inner_state[0].mu["a"].spec == rows.spec
    assert state.inner_states["a"].inner_state[0].mu["b"].spec == columns.spec


def test_an_eager_update_on_an_explicit_mesh_is_compiled_once():
    sharding = on_mesh("both", kind=AxisType.Explicit)
    tx = gj.galore_sgd(1e-2, **LENS)
    params = jax.device_put(draw(0), sharding)
    state = tx.init(params)
    before = meshes._automatic._cache_size()
    for _ in range(3):
        _, state = tx.update(params, state, params)
    assert meshes._automatic._cache_size() <= before + 2  # shardings settle in the first step
