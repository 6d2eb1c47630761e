"""Every error says which leaf, what was seen, and how to fix it; and is raised early."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import galore_jax as gj

PARAMS = {"layer": {"kernel": jnp.zeros((10, 6)), "bias": jnp.zeros((6,))}}
KERNEL = "layer/kernel"


def lens(rank=2, inner=None, **options):
    return gj.low_rank_projection(optax.trace(0.9) if inner is None else inner, rank, **options)


def message(error_type, call):
    with pytest.raises(error_type) as error:
        call()
    assert type(error.value) is error_type
    return str(error.value)


def contains(text, *needles):
    assert all(needle in text for needle in needles), text


CONSTRUCTION = {
    "rank zero": (ValueError, {"rank": 0}, ["`rank`", "0"]),
    "rank negative": (ValueError, {"rank": -3}, ["`rank`", "-3"]),
    "rank float zero": (ValueError, {"rank": 0.0}, ["`rank`", "(0, 1]"]),
    "rank float": (ValueError, {"rank": 2.5}, ["`rank`", "(0, 1]", "2.5"]),
    "rank nan": (ValueError, {"rank": float("nan")}, ["`rank`", "nan"]),
    "rank string": (TypeError, {"rank": "8"}, ["`rank`", "'8'"]),
    "rank none": (TypeError, {"rank": None}, ["`rank`", "None"]),
    "rank bool": (TypeError, {"rank": True}, ["`rank`", "True"]),
    "rank NumPy bool": (TypeError, {"rank": np.bool(True)}, ["`rank`", "True"]),
    "rank array": (TypeError, {"rank": jnp.int32(3)}, ["`rank`", "STATIC_ARGS"]),
    "side": (ValueError, {"side": "left"}, ["'left'", "'short'", "'long'", "'input'", "'output'"]),
    "gap zero": (ValueError, {"refresh": 0}, ["gap", "0"]),
    "gap float": (TypeError, {"refresh": 2.0}, ["gap", "2.0"]),
    "gap none": (TypeError, {"refresh": None}, ["gap", "None"]),
    "gap bool": (TypeError, {"refresh": True}, ["gap", "True"]),
    "gap array": (TypeError, {"refresh": jnp.int32(3)}, ["gap", "STATIC_ARGS"]),
    "gap class": (TypeError, {"refresh": gj.refresh.every}, ["gap"]),
    "projector class": (TypeError, {"projector": gj.projectors.svd}, ["`projector`", "svd()"]),
    "projector string": (TypeError, {"projector": "svd"}, ["`projector`", "Projector", "'svd'"]),
    "transport class": (TypeError, {"transport": gj.transport.keep}, ["`transport`", "keep()"]),
    "codec class": (TypeError, {"codec": gj.codecs.identity}, ["`codec`", "identity()"]),
    "keep": (ValueError, {"transport": gj.transport.keep()}, ["randomized_svd", "align()", "svd"]),
    "state dtype": (TypeError, {"state_dtype": jnp.int32}, ["`state_dtype`", "int32"]),
    "seed": (TypeError, {"seed": 1.5}, ["`seed`", "1.5"]),
    "axes": (TypeError, {"axes": {"kernel": {"deep": 3}}}, ["`axes`", "3", "MatrixAxes"]),
    "targets": (TypeError, {"targets": 3}, ["`targets`", "3"]),
    "targets regex": (ValueError, {"targets": "("}, ["`targets`", "regex", "'('"]),
    "one of the targets": (ValueError, {"targets": ["w", "("]}, ["`targets`", "regex", "'('"]),
    "axes regex": (ValueError, {"axes": {"(": gj.MatrixAxes()}}, ["`axes`", "regex", "'('"]),
}


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_construction(name):
    error_type, options, needles = CONSTRUCTION[name]
    contains(message(error_type, lambda: lens(**options)), *needles)


@pytest.mark.parametrize("name", ["rank zero", "side", "gap zero", "keep", "targets", "seed"])
@pytest.mark.parametrize(
    "alias",
    [gj.galore, gj.galore_adamw, gj.galore_lion, gj.galore_sgd, gj.galore_adafactor],
    ids=lambda alias: alias.__name__,
)
def test_construction_of_the_aliases(alias, name):
    error_type, options, needles = CONSTRUCTION[name]
    options = {"update_proj_gap" if k == "refresh" else k: v for k, v in options.items()}
    contains(message(error_type, lambda: alias(1e-2, **options)), *needles)


PARTS = {
    "every": (ValueError, lambda: gj.refresh.every(0), ["gap", "0"]),
    "staggered": (ValueError, lambda: gj.refresh.staggered(-1), ["gap", "-1"]),
    "staggered kind": (TypeError, lambda: gj.refresh.staggered("5"), ["gap", "'5'"]),
    "oversample": (ValueError, lambda: gj.projectors.randomized_svd(oversample=-1), ["oversample"]),
    "power": (ValueError, lambda: gj.projectors.randomized_svd(power_iters=0), ["power_iters"]),
    "power kind": (TypeError, lambda: gj.projectors.randomized_svd(power_iters=1.0), ["1.0"]),
    "steps": (ValueError, lambda: gj.projectors.subspace_iteration(steps=0), ["steps"]),
    "signs": (ValueError, lambda: gj.projectors.svd(signs="negative"), ["signs", "'negative'"]),
    "cast": (TypeError, lambda: gj.codecs.cast(jnp.int8), ["floating", "int8"]),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts(name):
    error_type, call, needles = PARTS[name]
    contains(message(error_type, call), *needles)


def test_axes_and_weight_dimension_numbers():
    def call():
        gj.galore(1e-2, 2, axes=gj.MatrixAxes(), weight_dimension_numbers=gj.MatrixAxes())

    contains(message(ValueError, call), "`axes`", "`weight_dimension_numbers`")


INIT = {
    "axis too high": (
        ValueError,
        {"axes": gj.MatrixAxes(0, 2)},
        PARAMS,
        [KERNEL, "axis 2", "(10, 6)", "regex"],
    ),
    "axis too low": (ValueError, {"axes": gj.MatrixAxes(-3, 1)}, PARAMS, [KERNEL, "-3"]),
    "one axis by two names": (
        ValueError,
        {"axes": {"kernel": gj.MatrixAxes(0, -2)}},
        PARAMS,
        [KERNEL, "(10, 6)", "twice"],
    ),
    "axes for a vector": (
        ValueError,
        {"axes": {"layer": {"kernel": None, "bias": gj.MatrixAxes()}}},
        PARAMS,
        ["layer/bias", "(6,)"],
    ),
    "axes tree": (
        ValueError,
        {"axes": {"other": {"kernel": gj.MatrixAxes()}}},
        PARAMS,
        ["`axes`", "other", "layer"],
    ),
    "axes tree, deeper than the leaf": (
        ValueError,
        {"axes": {"layer": {"kernel": {"value": gj.MatrixAxes()}, "bias": None}}},
        PARAMS,
        ["`axes`", "does not match"],
    ),
    "axes callable": (
        TypeError,
        {"axes": lambda params: {"layer": {"kernel": "input", "bias": None}}},
        PARAMS,
        ["`axes`", "'input'"],
    ),
    "rank callable": (
        ValueError,
        {"rank": lambda path, leaf: 0},
        PARAMS,
        [KERNEL, "returned 0", "positive"],
    ),
    "rank callable kind": (
        TypeError,
        {"rank": lambda path, leaf: "x"},
        PARAMS,
        [KERNEL, "returned 'x'"],
    ),
    "rank callable that returns another": (
        TypeError,
        {"rank": lambda path, leaf: lambda path, leaf: 2},
        PARAMS,
        [KERNEL, "returned <function"],
    ),
    "integer leaf": (
        ValueError,
        {"targets": "table"},
        {"table": jnp.zeros((10, 6), jnp.int32)},
        ["'table'", "int32", "floating", "`targets`"],
    ),
    "integer leaf named by axes": (
        ValueError,
        {"axes": {"table": gj.MatrixAxes()}},
        {"table": jnp.zeros((10, 6), jnp.int32)},
        ["'table'", "int32", "floating", "`axes`"],
    ),
    "complex leaf": (
        ValueError,
        {"targets": "table"},
        {"table": jnp.zeros((10, 6), jnp.complex64)},
        ["'table'", "complex64", "floating"],
    ),
    "inner with params": (
        ValueError,
        {"inner": optax.add_decayed_weights(0.1)},
        PARAMS,
        ["params", "full space", "add_decayed_weights", "chain"],
    ),
    "inner with a trust ratio": (
        ValueError,
        {"inner": optax.chain(optax.trace(0.9), optax.scale_by_trust_ratio())},
        PARAMS,
        ["params", "subspace"],
    ),
    "optax's factored RMS": (
        ValueError,
        {"inner": optax.scale_by_factored_rms()},
        PARAMS,
        ["params", "subspace"],
    ),
}


@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.parametrize("name", INIT)
def test_init(name, abstract):
    error_type, options, params, needles = INIT[name]
    params = jax.eval_shape(lambda: params) if abstract else params
    contains(message(error_type, lambda: lens(**options).init(params)), *needles)


def test_errors_do_not_print_the_weights():
    axes = {"layer": [gj.MatrixAxes()]}
    text = message(ValueError, lambda: lens(axes=axes).init(PARAMS))
    assert len(text) < 2000 and "0., 0." not in text


def state_of(tx, steps=1):
    state = tx.init(PARAMS)
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    for _ in range(steps):
        _, state = jax.jit(tx.update)(gradient, state)
    return state


STORAGE = {
    "rank": ({"rank": 3}, {"rank": 2}, ["rank=3", "rank=2"]),
    "side": ({"side": "long"}, {}, ["side='long'", "side='short'"]),
    "codec": ({"codec": gj.codecs.cast("bfloat16")}, {}, ["codec=cast", "codec=identity()"]),
    "state dtype": ({"state_dtype": jnp.bfloat16}, {}, ["state_dtype", "bfloat16"]),
    "targets": ({"targets": "bias"}, {}, ["targets='bias'", "targets=None"]),
    "axes": ({"axes": gj.MatrixAxes(1, 0)}, {}, ["axes=", "axes=None"]),
}


@pytest.mark.parametrize("name", STORAGE)
def test_a_state_made_otherwise_is_refused_by_name(name):
    old, new, needles = STORAGE[name]
    state, tx = lens(**old).init(PARAMS), lens(**new)
    text = message(ValueError, lambda: tx.update(PARAMS, state))
    contains(text, *needles, "init anew")


def test_what_shapes_do_not_depend_on_may_change():
    state = state_of(lens(refresh=3))
    tx = lens(
        refresh=gj.refresh.staggered(5),
        scale=0.5,
        projector=gj.projectors.svd(),
        transport=gj.transport.keep(),
        seed=7,
    )
    updates, new = jax.jit(tx.update)(PARAMS, state)
    assert updates["layer"]["kernel"].shape == (10, 6) and new.count == 2


def test_a_state_for_other_parameters_is_refused_by_leaf():
    state = lens().init({"layer": {"kernel": jnp.zeros((10, 7)), "bias": jnp.zeros((6,))}})
    text = message(ValueError, lambda: lens().update(PARAMS, state))
    contains(text, KERNEL, "(7, 2)", "(6, 2)")


MESH, WHOLE = AbstractMesh((4, 2), ("data", "model")), P()


def on_mesh(kernel, bias=WHOLE, mesh=MESH):
    return {"layer": {"kernel": NamedSharding(mesh, kernel), "bias": NamedSharding(mesh, bias)}}


SHARDINGS = {
    "does not divide": (
        ValueError,
        on_mesh(P("data")),
        [KERNEL, "(10, 6)", "axis 0", "10", "'data'", "4 shards", "another axis"],
    ),
    "two mesh axes do not divide": (
        ValueError,
        on_mesh(P(None, ("data", "model"))),
        [KERNEL, "axis 1", "6", "('data', 'model')", "8 shards"],
    ),
    "more entries than axes": (
        ValueError,
        on_mesh(P(), P("model", None)),
        ["layer/bias", "(6,)", "2 entries", "1 axes", "one entry per axis"],
    ),
    "unconstrained": (
        ValueError,
        on_mesh(P(P.UNCONSTRAINED, "model")),
        [KERNEL, "axis 0", "UNCONSTRAINED", "None"],
    ),
    "two meshes": (
        ValueError,
        {
            "layer": {
                "bias": NamedSharding(MESH, P()),
                "kernel": NamedSharding(AbstractMesh((2,), ("x",)), P("x")),
            }
        },
        [KERNEL, "layer/bias", "'x': 2", "'data': 4", "one mesh"],
    ),
    "a leaf too few": (
        ValueError,
        {"layer": {"kernel": NamedSharding(MESH, P())}},
        ["`params_sharding`", "no sharding for 'layer/bias'"],
    ),
    "another name": (
        ValueError,
        {"layer": {"kernel": NamedSharding(MESH, P()), "scale": NamedSharding(MESH, P())}},
        ["no sharding for 'layer/bias'", "no parameter for 'layer/scale'", "every leaf"],
    ),
    "one for all": (ValueError, NamedSharding(MESH, P()), ["no sharding for", KERNEL]),
    "other containers": (ValueError, [on_mesh(P())], ["no sharding for", "'0/layer/kernel'"]),
    "a container": (
        TypeError,
        {"layer": on_mesh(P())["layer"] | {"kernel": [NamedSharding(MESH, P())]}},
        [KERNEL, "[NamedSharding("],
    ),
    "a bare spec": (
        TypeError,
        {"layer": {"kernel": P("data"), "bias": P()}},
        ["layer/bias", "NamedSharding(mesh, spec)"],
    ),
    "None": (
        TypeError,
        {"layer": {"kernel": None, "bias": NamedSharding(MESH, P())}},
        [KERNEL, "None", "To replicate it"],
    ),
    "one device": (
        TypeError,
        {"layer": on_mesh(P())["layer"] | {"kernel": SingleDeviceSharding(jax.devices()[0])}},
        [KERNEL, "SingleDeviceSharding", "NamedSharding"],
    ),
}
TAKE_SHARDINGS = {
    "state_sharding": lambda sharding: gj.state_sharding(lens(), PARAMS, sharding),
    "init_sharded": lambda sharding: gj.init_sharded(lens(), PARAMS, sharding),
    "describe": lambda sharding: gj.describe(lens(), PARAMS, sharding),
    "params_sharding": lambda sharding: gj.quant.params_sharding(
        gj.quant.quantize_params(PARAMS), sharding
    ),
}


@pytest.mark.parametrize("function", TAKE_SHARDINGS)
@pytest.mark.parametrize("name", SHARDINGS)
def test_shardings(name, function):
    error_type, sharding, needles = SHARDINGS[name]
    contains(message(error_type, lambda: TAKE_SHARDINGS[function](sharding)), *needles)


def test_a_mesh_axis_that_does_not_exist_is_refused_by_jax():
    """A `NamedSharding` with one cannot be made, so none can get here."""
    contains(message(ValueError, lambda: NamedSharding(MESH, P("fsdp"))), "fsdp", "data", "model")


def test_no_parameters_no_mesh():
    contains(message(ValueError, lambda: gj.state_sharding(lens(), {}, {})), "no parameter", "mesh")


def test_a_mesh_that_a_saved_state_cannot_take_is_refused_by_leaf():
    """Shardings to restore with come from `state_sharding`, which asks the new mesh first."""
    gj.state_sharding(lens(), PARAMS, on_mesh(P("model")))
    eight = AbstractMesh((1, 8), ("data", "model"))
    text = message(
        ValueError, lambda: gj.state_sharding(lens(), PARAMS, on_mesh(P("model"), mesh=eight))
    )
    contains(text, KERNEL, "(10, 6)", "8 shards", "another axis")


def test_a_state_on_other_devices_than_its_gradients_is_refused_by_argument():
    half = jax.sharding.Mesh(jax.devices()[:2], ("model",), axis_types=(AxisType.Auto,))
    state = gj.init_sharded(lens(), PARAMS, on_mesh(P("model"), mesh=half))
    gradients = jax.device_put(PARAMS, jax.devices()[3])
    text = message(ValueError, lambda: jax.jit(lens().update)(gradients, state))
    contains(text, "incompatible devices", "updates['layer']", "state.count")


@pytest.mark.parametrize("static", [False, True])
def test_inject_hyperparams_without_static_args(static):
    make = optax.inject_hyperparams(gj.galore_sgd, static_args=gj.STATIC_ARGS if static else ())
    if static:
        make(learning_rate=0.1, rank=2).init(PARAMS)
        return
    text = message(TypeError, lambda: make(learning_rate=0.1, rank=2).init(PARAMS))
    contains(text, "STATIC_ARGS")


def test_nothing_is_printed(capfd):
    state_of(lens(), 2)
    assert capfd.readouterr() == ("", "")


def test_extra_arguments_reach_the_inner():
    def update(updates, state, params=None, *, factor):
        return jax.tree.map(lambda u: u * np.float32(factor), updates), state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    tx = lens(inner=inner, refresh=1)
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    state = tx.init(PARAMS)
    one, _ = tx.update(gradient, state, factor=1)
    three, _ = tx.update(gradient, state, PARAMS, factor=3)
    np.testing.assert_allclose(three["layer"]["kernel"], 3 * one["layer"]["kernel"], rtol=1e-5)
