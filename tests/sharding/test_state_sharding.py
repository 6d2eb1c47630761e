"""There is a sharding for every array of a state, and it follows from that of its parameter."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_cases import SHAPES as MATRICES
from mesh_cases import SPECS, draw, mesh_of

import galore_jax as gj
from galore_jax import meshes

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction

SHAPES = MATRICES | {"embed": (64, 32), "norm": (32,)}
LENS = {"rank": 8, "axes": gj.MatrixAxes()}
SMALL_MOMENTS = {"min_size": 64, "block": 16}
EVERY_KIND = {
    "sgd": gj.galore_sgd(1e-2, **LENS),
    "adamw, long": gj.galore_adamw(1e-2, **LENS, side="long", weight_decay=0.1),
    "int4 bases": gj.low_rank_projection(
        gj.quantized_state(optax.scale_by_adam(), **SMALL_MOMENTS),
        **LENS,
        codec=gj.codecs.int4(block=16),
    ),
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


def on_mesh(specs, kind=AxisType.Auto):
    mesh, rest = mesh_of("4x2", kind), {"embed": P("data", "model"), "norm": P("data")}
    return {k: NamedSharding(mesh, spec) for k, spec in (SPECS["4x2"][specs] | rest).items()}


@pytest.mark.parametrize("tx", EVERY_KIND.values(), ids=EVERY_KIND)
@pytest.mark.parametrize("spread", [False, True])
def test_there_is_a_sharding_for_every_array(tx, spread):
    params, sharding = draw(0, SHAPES), on_mesh("both")
    shardings = gj.state_sharding(tx, params, sharding, spread=spread)
    state = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    for array, spec in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert spec.shard_shape(array.shape) is not None  # raises where it does not divide


def test_specs_follow_from_those_of_the_parameters():
    sharding = on_mesh("both")
    state = gj.state_sharding(gj.galore_adamw(1e-2, **LENS), draw(0, SHAPES), sharding)[0]
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
    mu = gj.state_sharding(tx, draw(0, SHAPES), sharding)[0].inner_state.mu
    assert tuple(mu["tall"].spec) == (None, None)
    mu = gj.state_sharding(tx, draw(0, SHAPES), sharding, spread=True)[0].inner_state.mu
    assert tuple(mu["tall"].spec) == ("model", None)


def test_an_axis_that_the_mesh_does_not_divide_is_replicated():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.ones((64, 24))}  # three blocks along the first axis
    tx = gj.quantized_state(optax.scale_by_adam(), min_size=1, block=24)
    state = gj.state_sharding(tx, params, {"w": NamedSharding(mesh, P("data"))})
    assert tuple(state.mu["w"].codes.spec) == ("data", None)
    assert tuple(state.mu["w"].scales.spec) == (None, None)


def test_of_two_mesh_axes_the_one_that_divides_stays():
    """Spread over eight devices it would not fit; over the four of its own axis it does."""
    params = {"w": jax.ShapeDtypeStruct((12, 8), jnp.float32)}
    sharding = {"w": NamedSharding(mesh_of("4x2"), P("data", "model"))}
    tx = gj.galore_adamw(1e-2, rank=4)
    for spread in (False, True):
        mu = gj.state_sharding(tx, params, sharding, spread=spread)[0].inner_state.mu["w"]
        assert tuple(mu.spec) == ("data", None)


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
    params = jax.device_put(draw(0, SHAPES), sharding)
    state = tx.init(params)
    before = meshes._automatic._cache_size()
    for _ in range(3):
        _, state = tx.update(params, state, params)
    assert meshes._automatic._cache_size() <= before + 2  # shardings settle in the first step
