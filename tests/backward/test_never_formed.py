"""No gradient of a projected leaf exists in a compiled step, and none travels."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_jax as gj
from galore_jax import projectors

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction

# Sizes whose products tell what an array is: rows, layers, and the sides of the matrices.
TOKENS, LAYERS, WIDTH, HIDDEN, OUT, RANK = 8 * 17, 3, 40, 112, 56, 4
PARAMS = {
    "blocks": {"up": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, HIDDEN, WIDTH)},
    "last": (WIDTH, OUT),
}
PARAMS = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
    PARAMS,
    is_leaf=lambda node: isinstance(node, tuple),
)
BATCH = tuple(jax.ShapeDtypeStruct((TOKENS, size), jnp.float32) for size in (WIDTH, OUT))
SIZES = {WIDTH * HIDDEN, WIDTH * OUT, LAYERS * WIDTH * HIDDEN}


def loss(params, x, y):
    def layer(h, w):
        return h + jnp.tanh(h @ w["up"]) @ w["down"], None

    h, _ = jax.lax.scan(jax.checkpoint(layer), x, params["blocks"])
    return jnp.mean((h @ params["last"] - y) ** 2)


def gradient_of(way, tx):
    if way == "full":
        return lambda params, state, *batch: jax.value_and_grad(loss)(params, *batch)
    return gj.projected_value_and_grad(loss, tx)


def optimizer(**options):
    return gj.galore_adamw(1e-2, rank=RANK, axes=gj.MatrixAxes(-2, -1), **options)


def matrices(jaxpr):
    """Primitives, at any depth, that return an array of the size of a leaf or a matrix of it."""
    for equation in jaxpr.eqns:
        for output in equation.outvars:
            if np.prod(output.aval.shape, dtype=int) in SIZES:
                yield equation.primitive.name
        for inner in jaxprs_in_params(equation.params):
            yield from matrices(inner)


# Of the parameters themselves: a layer of a stack, its transposition for dx.
READING = {"dynamic_slice", "squeeze", "transpose", "stop_gradient", "convert_element_type", "copy"}


@pytest.mark.parametrize(
    "projector",
    [None, projectors.randomized_svd(oversample=2), projectors.random_orthonormal()],
    ids=repr,
)
@pytest.mark.parametrize("side", ["short", "long"])
def test_the_backward_pass_has_no_product_of_the_size_of_a_matrix(side, projector):
    tx = optimizer(side=side, projector=projector)
    state = jax.eval_shape(tx.init, PARAMS)

    def products(way):
        traced = jax.jit(gradient_of(way, tx)).trace(PARAMS, state, *BATCH)
        found = list(matrices(traced.jaxpr.jaxpr))
        return found.count("dot_general"), set(found) & {"add", "add_any", "mul"}

    assert products("projected") == (0, set())
    assert products("full")[0] == 3  # the control: that many of them there would be


def compiled(step, *args):
    return jax.jit(step).lower(*args).compile().as_text()


def dots(text):
    """Shapes of the results of all products in a compiled program."""
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* (?:dot|custom-call)\(", text)
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]


def test_a_whole_compiled_step_has_only_the_lift():
    tx = optimizer()
    state = jax.eval_shape(tx.init, PARAMS)

    def step(way):
        def run(params, state, *batch):
            value, gradient = gradient_of(way, tx)(params, state, *batch)
            updates, state = tx.update(gradient, state, params)
            return value, updates, state

        return run

    def big(way):
        return sorted(n for n in dots(compiled(step(way), PARAMS, state, *BATCH)) if n in SIZES)

    lift = [WIDTH * OUT, LAYERS * WIDTH * HIDDEN, LAYERS * WIDTH * HIDDEN]
    assert big("projected") == lift
    assert big("full") == sorted([*lift, WIDTH * HIDDEN, WIDTH * HIDDEN, WIDTH * OUT])


def reductions(text):
    """Sizes of all arrays that are reduced, gathered or exchanged in a compiled program."""
    pattern = r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all)(?:-start)?\("
    return [
        int(np.prod([int(n) for n in shape.split(",") if n] or [1]))
        for match in re.findall(pattern, text)
        for shape in re.findall(r"\w+\[([\d,]*)\]", match)
    ]


MESH = ((8,), ("data",))


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh(*MESH, axis_types=(kind,))


def by_jit(way):
    """Parameters everywhere, the batch spread."""
    tx = optimizer()
    state = jax.eval_shape(tx.init, PARAMS)
    mesh = mesh_of()
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    fn = jax.jit(
        gradient_of(way, tx), in_shardings=(everywhere, everywhere, rows, rows),
        out_shardings=everywhere,
    )  # fmt: skip
    return fn.lower(PARAMS, state, *BATCH).compile().as_text()


def by_shard_map(way, check_vma=True):
    tx = optimizer(axis_name="data")
    state = jax.eval_shape(tx.init, PARAMS)

    def step(params, state, *batch):
        if way == "full":
            params = jax.tree.map(lambda p: jax.lax.pcast(p, ("data",), to="varying"), params) if check_vma else params  # fmt: skip  # noqa: E501
        value, gradient = gradient_of(way, tx)(params, state, *batch)
        if way == "full":
            gradient = jax.lax.pmean(gradient, "data")
        else:
            gradient = tx.update(gradient, state, params)
        return jax.lax.pmean(value, "data"), gradient

    mapped = jax.shard_map(
        step, mesh=mesh_of(), in_specs=(P(), P(), P("data"), P("data")), out_specs=P(),
        check_vma=check_vma,
    )  # fmt: skip
    return compiled(mapped, PARAMS, state, *BATCH)


def by_pmap(way):
    tx = optimizer(axis_name="data")
    state = jax.eval_shape(tx.init, PARAMS)

    def step(params, state, *batch):
        value, gradient = gradient_of(way, tx)(params, state, *batch)
        if way == "full":
            return value, jax.lax.pmean(gradient, "data")
        return value, tx.update(gradient, state, params)

    spread = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((8, x.shape[0] // 8, *x.shape[1:]), x.dtype), BATCH
    )
    mapped = jax.pmap(step, axis_name="data", in_axes=(None, None, 0, 0))
    return mapped.lower(PARAMS, state, *spread).compile().as_text()


WAYS = {
    "jit": by_jit,
    "shard_map": by_shard_map,
    "shard_map, unchecked": lambda way: by_shard_map(way, check_vma=False),
    "pmap": by_pmap,
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.sampled(1)
def test_only_rank_sized_arrays_travel(name):
    found = reductions(WAYS[name]("projected"))
    assert max(found) <= LAYERS * HIDDEN * RANK
    # The control: all gradients, one layer at a time or all at once.
    assert sum(n for n in reductions(WAYS[name]("full")) if n > LAYERS * HIDDEN * RANK) >= (
        2 * WIDTH * HIDDEN + WIDTH * OUT
    )


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.sampled(1)
def test_what_travels_on_an_ordinary_step_is_exactly_what_the_lens_projects_to(check_vma):
    """R of every leaf, and the loss; sketches travel inside of conditionals."""
    computations = re.split(r"\n(?=\S)", by_shard_map("projected", check_vma))
    everywhere = max((reductions(text) for text in computations), key=sum)
    low_rank = (2 * LAYERS * HIDDEN + OUT) * RANK
    assert sum(everywhere) == low_rank + 1


def test_no_collective_of_the_size_of_a_stack_with_sharded_parameters():
    """FSDP gathers the weights of a layer, and never a gradient."""
    mesh, tx = mesh_of(), optimizer()
    specs = {"blocks": {"up": P(None, "data"), "down": P(None, "data")}, "last": P("data")}  # fmt: skip  # noqa: E501
    sharding = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    states = gj.state_sharding(tx, PARAMS, sharding)
    rows = NamedSharding(mesh, P("data"))

    def step(way):
        def run(params, state, *batch):
            value, gradient = gradient_of(way, tx)(params, state, *batch)
            updates, state = tx.update(gradient, state, params)
            return value, updates, state

        fn = jax.jit(
            run, in_shardings=(sharding, states, rows, rows), out_shardings=(None, sharding, states)
        )
        return fn.lower(PARAMS, jax.eval_shape(tx.init, PARAMS), *BATCH).compile().as_text()

    def summed(text):
        lines = re.findall(r"= (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\(", text)
        shapes = [shape for line in lines for shape in re.findall(r"\w+\[([\d,]*)\]", line)]
        return {int(np.prod([int(n) for n in shape.split(",") if n] or [1])) for shape in shapes}

    ours, control = step("projected"), step("full")
    assert summed(ours) and not SIZES & summed(ours)
    assert SIZES & summed(control)
    assert LAYERS * WIDTH * HIDDEN not in reductions(ours)
