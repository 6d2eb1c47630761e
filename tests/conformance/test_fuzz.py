"""Random trees, shapes, dtypes, ranks, axes, sides, storage, meshes and layers, against the laws.

A short search belongs to the suite; the long one is marked slow.
"""

from __future__ import annotations

import math

import conformance_cases as cc
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import galore_jax as gj
from galore_jax import layerwise

PROJECTORS = [
    (gj.projectors.svd(), gj.transport.keep()),
    (gj.projectors.gram_eigh(), gj.transport.reset()),
    (gj.projectors.randomized_svd(), gj.transport.align()),
    (gj.projectors.randomized_svd(oversample=2, warm_start=False), gj.transport.rotate()),
    (gj.projectors.subspace_iteration(), gj.transport.align()),
    (gj.projectors.random_orthonormal(), gj.transport.align()),
]
ADAM = cc.relaxed(optax.scale_by_adam())
INNERS = [
    optax.trace(0.9),
    optax.scale_by_lion(),
    ADAM,
    gj.quantized_state(optax.scale_by_lion(), min_size=2, block=4),
]
# How far a basis may be from orthonormal; codes on blocks this small promise nothing.
CODECS = {
    gj.codecs.identity(): 1e-5,
    gj.codecs.cast("bfloat16"): 2e-2,
    gj.codecs.int8(block=8): None,
    gj.codecs.int4(block=8): None,
}
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5}
# How good a gradient is: noise, or something that a factorization has to survive.
KINDS = ["noise", "zero", "one entry", "rank one", "huge", "tiny", "equal"]
SIDES = ["short", "long", "input", "output"]
seeds = st.integers(0, 2**16)


@st.composite
def axes_of(draw, ndim):
    """Axes of a matrix, in any order, grouped in any way, counted from either end."""
    order = draw(st.permutations(range(ndim)))
    cut = draw(st.integers(1, ndim - 1))
    end = draw(st.integers(cut + 1, ndim))
    signs = [draw(st.sampled_from([0, ndim])) for _ in range(ndim)]
    named = [axis - sign for axis, sign in zip(order, signs, strict=True)]
    return gj.MatrixAxes(tuple(named[:cut]), tuple(named[cut:end]))


@st.composite
def leaves(draw):
    ndim = draw(st.integers(0, 4))
    shape = tuple(draw(st.integers(1, 6)) for _ in range(ndim))
    dtype = draw(st.sampled_from([*TOLERANCE, "float32", "int32"]))
    axes = draw(axes_of(ndim)) if ndim >= 2 and dtype != "int32" else None
    return shape, dtype, axes, draw(st.sampled_from(KINDS))


problems = st.fixed_dictionaries(
    {
        "leaves": st.lists(leaves(), min_size=1, max_size=3),
        "rank": st.one_of(st.integers(1, 8), st.floats(0.05, 1.0)),
        "side": st.sampled_from(SIDES),
        "method": st.sampled_from(PROJECTORS),
        "codec": st.sampled_from(list(CODECS)),
        "refresh": st.sampled_from(
            [gj.refresh.every(1), gj.refresh.staggered(2), gj.refresh.adaptive(1, patience=1)]
        ),
        "inner": st.sampled_from(INNERS),
        "state_dtype": st.sampled_from(["float32", "float32", "bfloat16"]),
        "nested": st.booleans(),
        "seed": seeds,
    }
)


def gradient(rng, shape, dtype, kind):
    if dtype == "int32":
        return rng.integers(-3, 4, size=shape)
    noise = rng.normal(size=shape)
    if kind == "zero":
        return np.zeros(shape)
    if kind == "equal":
        return np.ones(shape)
    if kind == "one entry":
        return np.where(np.arange(noise.size).reshape(shape) == 0, 1.0, 0.0)
    if kind == "rank one" and noise.ndim:
        flat = noise.reshape(shape[0], -1)
        return (flat[:, :1] * flat[:1]).reshape(shape)
    big = {"float16": 1e2, "bfloat16": 1e18, "float32": 1e18}[dtype]
    return noise * {"huge": big, "tiny": 1 / big}.get(kind, 1.0)


def sides_of(shape, axes, side):
    """(batch, kept, projected) axes, by hand."""
    reduction, output = (
        tuple(a % len(shape) for a in group) for group in (axes.reduction_axis, axes.output_axis)
    )
    rows, columns = (math.prod(shape[a] for a in g) for g in (reduction, output))
    takes_input = {
        "short": rows <= columns, "long": rows >= columns, "input": True, "output": False,
    }[side]  # fmt: skip
    projected, kept = (reduction, output) if takes_input else (output, reduction)
    return tuple(a for a in range(len(shape)) if a not in reduction + output), kept, projected


def matrices(leaf, axes, side):
    """``[number, kept, projected]``."""
    leaf = np.asarray(leaf, np.float64)
    groups = sides_of(leaf.shape, axes, side)
    sizes = [math.prod(leaf.shape[a] for a in group) for group in groups]
    return leaf.transpose(sum(groups, ())).reshape(sizes)


def state_and_span(problem):
    """Laws 2, 5 and 7; bases orthonormal; everything finite."""
    rng = np.random.default_rng(problem["seed"])
    projector, transport = problem["method"]
    names = [f"w{i}" for i in range(len(problem["leaves"]))]

    def nest(values):
        flat = dict(zip(names, values, strict=True))
        return {"a": [flat, None], "b": ()} if problem["nested"] else flat

    def grads(kinds=True):
        return nest(
            jnp.asarray(gradient(rng, shape, dtype, kind if kinds else "noise"), dtype)
            for shape, dtype, _, kind in problem["leaves"]
        )

    tx = gj.low_rank_projection(
        problem["inner"], problem["rank"], projector=projector, transport=transport,
        refresh=problem["refresh"], side=problem["side"], codec=problem["codec"],
        axes=nest(axes for _, _, axes, _ in problem["leaves"]), targets=None,
        state_dtype=problem["state_dtype"],
    )  # fmt: skip
    params = grads()
    state = tx.init(params)
    first = cc.signature(state)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert cc.signature(tx.init(shapes)) == first
    promised = gj.memory.estimate(tx, shapes)
    assert promised.state == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    step = cc.jit(tx.update)
    for kinds in (True, False):
        given = grads(kinds)
        update, state = step(given, state)
        assert cc.signature(state) == first
        assert cc.signature(update) == cc.signature(given)
        assert all(np.all(np.isfinite(np.asarray(x, np.float64))) for x in jax.tree.leaves(update))
        assert all(leaf.size > 0 for leaf in jax.tree.leaves(state))
        found = {path.rpartition("/")[2]: basis for path, basis in cc.bases(state).items()}
        by_name = {path.rpartition("/")[2]: leaf for path, leaf in cc.by_path(update).items()}
        for name, (_, dtype, axes, _) in zip(names, problem["leaves"], strict=True):
            if axes is None:
                assert name not in found
                continue
            rows = matrices(by_name[name], axes, problem["side"])
            _, kept, projected = rows.shape
            rank = problem["rank"]
            rank = max(1, round(rank * projected)) if isinstance(rank, float) else rank
            rank = min(rank, kept, projected)
            assert (name in found) == (rank < projected)
            if name not in found:
                continue
            basis = found[name]
            assert basis.shape == (rows.shape[0], projected, rank)
            gram = np.einsum("bpr,bps->brs", basis, basis)
            tolerance = CODECS[problem["codec"]]
            assert tolerance is None or np.max(np.abs(gram - np.eye(rank))) <= tolerance
            q, _ = np.linalg.qr(basis)
            outside = rows - rows @ q @ np.swapaxes(q, 1, 2)
            assert np.max(np.abs(outside)) <= TOLERANCE[dtype] * max(np.max(np.abs(rows)), 1e-30)


@st.composite
def layouts(draw):
    """One leaf whose bases are all distinct directions, and what is done to it."""
    ndim = draw(st.integers(2, 5))
    shape = tuple(draw(st.integers(2, 5)) for _ in range(ndim))
    return {
        "shape": shape,
        "axes": draw(axes_of(ndim)),
        "order": tuple(draw(st.permutations(range(ndim)))),
        "rank": draw(st.integers(1, 3)),
        "side": draw(st.sampled_from(["input", "output"])),  # a square one has no short side
        "method": draw(st.sampled_from(PROJECTORS)),
        "refresh": draw(st.sampled_from([1, 2])),
        "seed": draw(seeds),
    }


STEPS = 3


def options(problem, axes):
    projector, transport = problem["method"]
    return {
        "projector": projector, "transport": transport, "refresh": problem["refresh"],
        "side": problem["side"], "axes": axes, "targets": gj.all_matrices,
    }  # fmt: skip


def noise(problem, shape, count=STEPS):
    rng = np.random.default_rng(problem["seed"])
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(count)]


def followed(tx, gradients, params=None):
    """All updates, and the state at the end."""
    state = tx.init(gradients[0])
    step, updates = cc.jit(tx.update), []
    for one in gradients:
        update, state = step(one, state, params)
        updates.append(update)
    return updates, state


def permuted_axes(problem):
    """Law 3: a leaf with its axes permuted, and named so, keys included."""
    order, axes = problem["order"], problem["axes"]
    ndim = len(problem["shape"])
    moved = gj.MatrixAxes(*(
        tuple(order.index(a % ndim) for a in group)
        for group in (axes.reduction_axis, axes.output_axis)
    ))  # fmt: skip
    # Keys follow the number of a matrix, so the batch axes have to keep their order.
    batch, _, _ = sides_of(problem["shape"], axes, problem["side"])
    hypothesis.assume([a for a in order if a in batch] == list(batch))
    gradients = noise(problem, problem["shape"])
    plain, _ = followed(
        gj.low_rank_projection(optax.trace(0.9), problem["rank"], **options(problem, axes)),
        [{"w": one} for one in gradients],
    )
    permuted, _ = followed(
        gj.low_rank_projection(optax.trace(0.9), problem["rank"], **options(problem, moved)),
        [{"w": jnp.transpose(one, order)} for one in gradients],
    )
    for one, other in zip(plain, permuted, strict=True):
        np.testing.assert_allclose(jnp.transpose(one["w"], order), other["w"], atol=2e-4)


def alone_or_in_company(problem):
    """A leaf does not feel the others, of its shape or another, that share a loop with it."""
    gradients = noise(problem, (3, *problem["shape"]))
    tx = gj.low_rank_projection(
        optax.trace(0.9), problem["rank"], **options(problem, {"w": problem["axes"]})
    )
    alone, _ = followed(tx, [{"w1": one[1]} for one in gradients])
    # A stack of other leaves, with a matrix of the same shape among them.
    company, _ = followed(
        tx, [{"w0": one[0], "w1": one[1], "w2": one[2], "x": one[0].ravel()} for one in gradients]
    )
    for one, other in zip(alone, company, strict=True):
        np.testing.assert_allclose(one["w1"], other["w1"], atol=2e-4)


def accumulated(problem):
    """A window of equal micro-batches is a step; between the ends of windows nothing moves."""
    every = 1 + problem["seed"] % 3
    gradients = [{"w": one} for one in noise(problem, problem["shape"])]
    params = jax.tree.map(jnp.zeros_like, gradients[0])
    tx = gj.low_rank_projection(
        optax.trace(0.9), problem["rank"], **options(problem, {"w": problem["axes"]})
    )
    expected, _ = followed(tx, gradients, params)
    window = gj.accumulate(tx, every)
    first = cc.signature(window.init(params))
    parts = [one for one in gradients for _ in range(every)]
    found, state = followed(window, parts, params)
    assert cc.signature(state) == first
    for number, update in enumerate(found):
        last = number % every == every - 1
        wanted = expected[number // every]["w"] if last else np.zeros(problem["shape"])
        np.testing.assert_allclose(update["w"], wanted, atol=2e-4)


MESHES = [{"a": 8}, {"a": 2, "b": 4}, {"a": 4, "b": 2}, {"a": 2, "b": 2, "c": 2}]


@st.composite
def sharded(draw):
    """A leaf with any spec, and a mesh; it may be that they do not fit."""
    sizes = draw(st.sampled_from(MESHES))
    ndim = draw(st.integers(2, 4))
    shape = tuple(draw(st.sampled_from([2, 3, 4, 6, 8, 16])) for _ in range(ndim))
    owners = [draw(st.sampled_from([None, *range(ndim)])) for _ in sizes]
    entries = [
        tuple(name for name, owner in zip(sizes, owners, strict=True) if owner == axis)
        for axis in range(ndim)
    ]
    return {
        "mesh": sizes,
        "explicit": draw(st.booleans()),
        "shape": shape,
        "spec": tuple(names or None for names in entries),
        "axes": draw(axes_of(ndim)),
        "rank": draw(st.integers(1, 4)),
        "side": draw(st.sampled_from(SIDES)),
        "method": draw(st.sampled_from(PROJECTORS)),
        "codec": draw(st.sampled_from(list(CODECS))),
        "inner": draw(st.sampled_from(INNERS)),
        "refresh": 1,
        "spread": draw(st.booleans()),
        "seed": draw(seeds),
    }


def placed(problem):
    """(transformation, shapes, shardings) of a sharded problem."""
    kind = AxisType.Explicit if problem["explicit"] else AxisType.Auto
    sizes = problem["mesh"]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))
    tx = gj.low_rank_projection(
        problem["inner"], problem["rank"], codec=problem["codec"],
        **options(problem, {"w": problem["axes"]}),
    )  # fmt: skip
    shapes = {"w": jax.ShapeDtypeStruct(problem["shape"], jnp.float32)}
    return tx, shapes, {"w": NamedSharding(mesh, PartitionSpec(*problem["spec"]))}


def fits(problem):
    return all(
        size % math.prod(problem["mesh"][name] for name in names or ()) == 0
        for size, names in zip(problem["shape"], problem["spec"], strict=True)
    )


def sharding_tree(problem):
    """Law 7: the tree of shardings is the tree of the state, and each divides its array."""
    tx, shapes, shardings = placed(problem)
    if not fits(problem):
        with pytest.raises(ValueError, match="'w'"):
            gj.state_sharding(tx, shapes, shardings, spread=problem["spread"])
        return
    found = gj.state_sharding(tx, shapes, shardings, spread=problem["spread"])
    state = jax.eval_shape(tx.init, shapes)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        sharding.shard_shape(leaf.shape)  # raises unless it divides
        used = [name for entry in sharding.spec for name in _names(entry)]
        assert len(used) == len(set(used))
    if problem["codec"] == gj.codecs.identity() and found.projectors["w"].spec:
        batch, _, projected = sides_of(problem["shape"], problem["axes"], problem["side"])
        allowed = {name for axis in batch + projected for name in _names(problem["spec"][axis])}
        used = {name for entry in found.projectors["w"].spec for name in _names(entry)}
        assert used <= allowed


def _names(entry):
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def on_a_mesh(problem):
    """Sharded or not, the updates are the same, and lie where the parameters do."""
    hypothesis.assume(fits(problem))
    tx, _, shardings = placed(problem)
    gradients = [{"w": one} for one in noise(problem, problem["shape"], 2)]
    expected, _ = followed(tx, gradients)
    where = gj.state_sharding(tx, gradients[0], shardings, spread=problem["spread"])
    given = [jax.device_put(one, shardings) for one in gradients]
    with jax.set_mesh(shardings["w"].mesh):
        state = gj.init_sharded(tx, given[0], shardings, spread=problem["spread"])
        step = cc.jit(tx.update, out_shardings=(shardings, where))
        for one, wanted in zip(given, expected, strict=True):
            update, state = step(one, state)
            assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, state, where))
            # A sum in another order may tip a code, and a sign.
            loose = CODECS[problem["codec"]] is None or problem["inner"] is not INNERS[0]
            close = np.isclose(update["w"], wanted["w"], atol=2e-2 if loose else 2e-4)
            assert np.mean(close) >= (0.8 if loose else 1.0)


def formed(fn, params, opt_state, *inputs, layer=0):
    """A pullback that knows of no lens, and forms every gradient."""
    del opt_state, layer
    return gj.backward.pullback(fn, params, (), *inputs)


layered = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 4),
        "width": st.integers(3, 7),
        "hidden": st.integers(2, 9),
        # Beyond that of the gradient, which is that of three outputs, Adam would make directions of
        # rounding errors.
        "rank": st.integers(1, 3),
        "side": st.sampled_from(SIDES),
        "method": st.sampled_from(PROJECTORS),
        "refresh": st.sampled_from([1, 2]),
        "inner": st.sampled_from([optax.trace(0.9), ADAM]),
        "every": st.sampled_from([1, 1, 2]),
        "pullback": st.sampled_from([{}, {"pullback": formed}]),
        "seed": seeds,
    }
)


def block(layer, x):
    return x + gj.matmul(jnp.tanh(gj.matmul(x, layer["up"])), layer["down"])


def layer_by_layer(problem):
    """One block at a time, or the gradient of everything first."""
    rng = np.random.default_rng(problem["seed"])
    layers, width, hidden = (problem[name] for name in ("layers", "width", "hidden"))

    def draw(*shape):
        return jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)

    params = {
        "inside": draw(5, width),
        "blocks": {"up": draw(layers, width, hidden), "down": draw(layers, hidden, width)},
        "outside": draw(width, 3),
    }
    batches = [(draw(11, 5), draw(11, 3)) for _ in range(STEPS * problem["every"])]

    def embed(params, batch):
        return gj.matmul(batch[0], params["inside"])

    def head(params, x, batch):
        return jnp.mean((gj.matmul(x, params["outside"]) - batch[1]) ** 2)

    def loss(params, batch):
        x, _ = jax.lax.scan(
            lambda x, layer: (block(layer, x), None), embed(params, batch), params["blocks"]
        )
        return head(params, x, batch)

    axes = {"blocks": gj.MatrixAxes(-2, -1)}
    lens = gj.low_rank_projection(problem["inner"], problem["rank"], **options(problem, axes))
    tx = gj.accumulate(optax.chain(lens, optax.scale(-1e-2)), problem["every"])

    def ordinary(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return gj.apply_updates(params, updates, key=None), state

    by_layer = layerwise.train_step(embed, block, head, tx, **problem["pullback"])
    # A projected pullback sees factors of the gradient: another sketch of it, the same subspace
    # only where that is determined.
    exact = bool(problem["pullback"]) or problem["method"][0].forms_gradient
    steps = cc.jit(ordinary), cc.jit(lambda *args: by_layer(*args)[:2])
    results = []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for step in steps:
            own, state = params, tx.init(params)
            for batch in batches if exact else batches[: problem["every"]]:
                own, state = step(own, state, batch)
            results.append((own, state))
    (expected, expected_state), (found, state) = results
    assert cc.signature(state) == cc.signature(expected_state)
    for path, leaf in cc.by_path(found).items():
        np.testing.assert_allclose(leaf, cc.by_path(expected)[path], atol=1e-3, err_msg=path)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), found, params)
    assert jax.tree.all(moved)


# Law -> (problems, how many in the suite, how many in the long search)
LAWS = {
    state_and_span: (problems, 10, 700),
    permuted_axes: (layouts(), 3, 250),
    alone_or_in_company: (layouts(), 3, 150),
    accumulated: (layouts(), 3, 150),
    sharding_tree: (sharded(), 10, 700),
    on_a_mesh: (sharded(), 2, 80),
    layer_by_layer: (layered, 2, 50),
}
every_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)


def search(law, count, **more):
    """Tries a law on so many problems; returns how many it was."""
    tried = []

    def attempt(problem):
        law(problem)
        tried.append(None)
        if len(tried) % 50 == 0:
            jax.clear_caches()  # a process may have so many mappings of memory

    settings = hypothesis.settings(
        max_examples=count, deadline=None, database=None, print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck), **more,
        phases=[hypothesis.Phase.generate],  # problems are small as they are, and slow to compile
    )  # fmt: skip
    settings(hypothesis.given(LAWS[law][0])(attempt))()
    return len(tried)


@every_law
@pytest.mark.sampled(2)
def test_a_few_random_problems(law):
    few = LAWS[law][1]
    assert search(law, few, derandomize=True) >= few // 2


@pytest.mark.slow
@every_law
def test_many_random_problems(law):
    many = LAWS[law][2]
    tried = search(law, many)
    print(f"{law.__name__}: {tried} problems")
    assert tried >= many // 2


def test_moments_in_16_bits_rotate_as_in_32():
    """Found by the long search: their dtype changed, and a decay of 0.999 is one in bf16."""
    gradients = noise({"seed": 0}, (6, 9), 4)

    def rotated(state_dtype):
        tx = gj.low_rank_projection(
            ADAM, 2, transport=gj.transport.rotate(), refresh=1, state_dtype=state_dtype
        )
        return followed(tx, gradients)

    found, state = rotated("bfloat16")
    assert state.inner_state.nu.dtype == jnp.bfloat16
    for one, other in zip(found, rotated("float32")[0], strict=True):
        np.testing.assert_allclose(one, other, atol=0.05 * float(jnp.max(jnp.abs(other))))


def test_the_long_search_is_long():
    assert sum(many for _, _, many in LAWS.values()) >= 2000
