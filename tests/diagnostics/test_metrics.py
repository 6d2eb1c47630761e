"""Counts, gaps and overlaps, compared with bases that are read out of the states."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_runs import AXES, PARAMS, PROJECTED, RANK, bases, lens, states, wandering

import galore_jax as gj
from galore_jax import codecs, projectors, refresh, transport

STEPS = 5


def expected_overlaps(run):
    """By loop and by leaf, from nothing but stored bases and counts."""
    zeros = {name: np.zeros(len(bases(run[0], name))) for name in PROJECTED}
    table = [dict(zeros)]
    for before, after in itertools.pairwise(run):
        row = {name: known.copy() for name, known in table[-1].items()}
        for name in PROJECTED:
            counts = [np.ravel(s.refresh_state.refreshes[name]) for s in (before, after)]
            for i in np.flatnonzero((counts[0] > 0) & (counts[1] > counts[0])):
                old, new = bases(before, name)[i], bases(after, name)[i]
                row[name][i] = np.sum((old.T @ new) ** 2) / RANK
        table.append(row)
    return table


CASES = {
    "every": {"refresh": 2, "projector": projectors.svd(), "transport": transport.keep()},
    "staggered-bfloat16": {"refresh": refresh.staggered(3), "codec": codecs.cast("bfloat16")},
    "adaptive-int4": {"refresh": refresh.adaptive(1, patience=2), "codec": codecs.int4(block=8)},
    "long-rotate": {"refresh": 2, "side": "long", "transport": transport.rotate()},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.sampled(1)
def test_overlap_is_that_of_the_stored_bases_at_the_last_refresh(case):
    run = states(lens(**CASES[case]), wandering(STEPS))
    wanted = expected_overlaps(run)
    for state, row in zip(run, wanted, strict=True):
        seen = gj.metrics(state)
        assert tuple(seen) == PROJECTED
        for name in PROJECTED:
            assert seen[name].overlap.dtype == jnp.float32
            assert seen[name].overlap.shape == seen[name].refreshes.shape == seen[name].gap.shape
            # In few bits a basis is not orthonormal, and the share is cut off at one.
            np.testing.assert_allclose(
                np.ravel(seen[name].overlap), np.minimum(row[name], 1), atol=1e-5
            )
    last = np.concatenate(list(wanted[-1].values()))
    assert np.all(last > 0) and np.min(last) < 0.9 and np.ptp(last) > 0.1, "too much alike"


def test_projected_gradients_tell_the_same():
    """The refresh runs in the backward pass there, and the lens only adopts its bases."""
    params = {"wide": jnp.zeros((6, 9))}
    tx = lens(refresh=2, projector=projectors.subspace_iteration())
    run = states(tx, wandering(STEPS, params), params)
    value_and_grad = gj.projected_value_and_grad(
        lambda params, g: jnp.sum(gj.matmul(jnp.eye(6), params["wide"]) * g["wide"]), tx
    )

    @jax.jit
    def step(state, gradient):
        _, grads = value_and_grad(params, state, gradient)
        assert isinstance(grads["wide"], gj.ProjectedGradient)
        return tx.update(grads, state, params)[1]

    state = tx.init(params)
    for gradient, full in zip(wandering(STEPS, params), run[1:], strict=True):
        state = step(state, gradient)
        one, other = gj.metrics(state)["wide"], gj.metrics(full)["wide"]
        np.testing.assert_allclose(one.overlap, other.overlap, atol=1e-4)
        assert one.refreshes == other.refreshes
    assert 0 < one.overlap < 0.999


def test_a_subspace_that_stays_and_one_that_is_left():
    tx = lens(refresh=1)
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    first, second = (rng.normal(size=(9, 2)) @ directions[:, i : i + 2].T for i in (0, 2))
    here, there = ({"tall": jnp.asarray(g, jnp.float32)} for g in (first, second))
    run = states(tx, [here, here, there, there], {"tall": PARAMS["tall"]})
    overlaps = [float(gj.metrics(state)["tall"].overlap) for state in run]
    np.testing.assert_allclose(overlaps, [0, 0, 1, 0, 1], atol=1e-5)


def test_counts_are_those_of_the_state():
    for state in states(lens(refresh=refresh.staggered(3)), wandering(4)):
        for name, seen in gj.metrics(state).items():
            np.testing.assert_array_equal(seen.refreshes, state.refresh_state.refreshes[name])


@pytest.mark.parametrize("kind", [refresh.every, refresh.staggered])
def test_the_gap_of_a_policy_with_one_gap(kind):
    for seen in gj.metrics(lens(refresh=kind(7)).init(PARAMS)).values():
        np.testing.assert_array_equal(seen.gap, np.full(seen.refreshes.shape, 7))


def test_gap_and_overlap_of_adaptive_are_what_it_remembers():
    tx = lens(refresh=refresh.adaptive(1, threshold=0.5, patience=1, max_gap=4))
    run = states(tx, wandering(STEPS))
    gaps = set()
    for state in run[2:]:
        for name, seen in gj.metrics(state).items():
            memory = state.refresh_state.memory[name]
            np.testing.assert_array_equal(seen.gap, memory.gap)
            np.testing.assert_allclose(seen.overlap, memory.similarities[..., -1], atol=1e-6)
            gaps |= set(np.ravel(seen.gap).tolist())
    assert len(gaps) > 1, "no gap has grown"


class OnceOnly(refresh.RefreshPolicy):
    """A policy that has no gap."""

    def decide(self, count, memory, seen):
        del count, seen
        return jnp.zeros((), bool), memory

    def __eq__(self, other):
        return type(self) is type(other)

    def __hash__(self):
        return 0


def test_a_policy_without_a_gap():
    (_, state) = states(lens(refresh=OnceOnly()), wandering(1))
    assert {int(np.max(seen.gap)) for seen in gj.metrics(state).values()} == {0}
    assert all(np.all(seen.refreshes == 1) for seen in gj.metrics(state).values())


def test_an_unusable_gradient_leaves_everything_as_it_was():
    gradients = list(wandering(4))
    gradients[2] = gradients[2] | {
        "tall": gradients[2]["tall"].at[0, 0].set(jnp.nan),
        "stack": gradients[2]["stack"].at[1].set(0),
    }
    run = states(lens(refresh=1), gradients)
    before, after = gj.metrics(run[2]), gj.metrics(run[3])
    for name, where in (("tall", ()), ("stack", (1,))):
        for one, other in zip(before[name], after[name], strict=True):
            np.testing.assert_array_equal(one[where], other[where])
    assert before["stack"].overlap[0] != after["stack"].overlap[0]
    assert np.all(np.isfinite(after["tall"].overlap))


def test_a_stack_is_its_layers_one_by_one():
    projector = projectors.svd()  # without random numbers, which differ by path
    stack = {"stack": PARAMS["stack"]}
    layers = {f"layer{i}": PARAMS["stack"][i] for i in range(3)}
    gradients = [{"stack": g["stack"]} for g in wandering(4)]
    apart = [{f"layer{i}": g["stack"][i] for i in range(3)} for g in gradients]
    one = gj.metrics(states(lens(refresh=1, projector=projector), gradients, stack)[-1])["stack"]
    many = gj.metrics(states(lens(refresh=1, projector=projector), apart, layers)[-1])
    assert list(many) == list(layers)
    for i, seen in enumerate(many.values()):
        np.testing.assert_allclose(one.overlap[i], seen.overlap, atol=1e-6)
        assert one.refreshes[i] == seen.refreshes and one.gap[i] == seen.gap


# Any state that holds a lens

TRACE = {"b1": 0.9, "update_proj_gap": 2, "axes": AXES}


def galore(**options):
    return gj.galore_lion(1e-2, RANK, **(TRACE | options))


SMALL = {"stack": PARAMS["stack"], "bias": PARAMS["bias"]}
WRAPPED = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1e6), galore()),
    "masked": lambda: optax.masked(galore(), {"stack": True, "bias": False}),
    "partition": lambda: optax.partition(
        {"matrix": galore(), "rest": optax.sgd(1e-2)}, {"stack": "matrix", "bias": "rest"}
    ),
    "MultiSteps": lambda: optax.MultiSteps(galore(), 1).gradient_transformation(),
    "accumulate": lambda: gj.accumulate(galore(), 1),
    "apply_if_finite": lambda: gj.apply_if_finite(galore(), 3),
    "optax.apply_if_finite": lambda: optax.apply_if_finite(galore(), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        gj.galore_lion, static_args=gj.STATIC_ARGS
    )(1e-2, RANK, **TRACE),
    "quantized_state": lambda: optax.chain(
        gj.low_rank_projection(
            gj.quantized_state(optax.scale_by_lion(), min_size=1), RANK, axes=AXES, refresh=2
        )
    ),
}


@pytest.fixture(scope="module")
def bare():
    return gj.metrics(states(galore(), wandering(3, SMALL), SMALL)[-1])


@pytest.mark.standard_promotion
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_lenses_are_found_wherever_they_are(wrapper, bare):
    seen = gj.metrics(states(WRAPPED[wrapper](), wandering(3, SMALL), SMALL)[-1])
    assert seen.keys() == bare.keys()
    for name, wanted in bare.items():
        for one, other in zip(seen[name], wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
        assert np.all(wanted.overlap > 0)


def test_without_a_lens_there_is_nothing():
    assert gj.metrics(optax.adam(1e-2).init(PARAMS)) == {}


def test_two_lenses_of_one_leaf_are_refused_by_name():
    state = lens().init(PARAMS)
    with pytest.raises(ValueError, match=r"leaf 'heads'.*two lenses"):
        gj.metrics({"generator": state, "critic": state})


def test_boxes_of_flax_are_seen_through():
    with nnx.use_eager_sharding(False):
        model = nnx.Linear(6, 9, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, gj.galore_sgd(1e-1, 2, update_proj_gap=5), wrt=nnx.Param)
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((4, 6))) ** 2))(model))
    (seen,) = gj.metrics(optimizer.opt_state).values()
    assert (int(seen.refreshes), int(seen.gap), float(seen.overlap)) == (1, 5, 0.0)


# Programs and devices


def test_under_jit_and_for_shapes():
    tx = lens(refresh=refresh.adaptive(2), codec=codecs.int4(block=8))
    state = tx.init(PARAMS)
    shapes = jax.eval_shape(gj.metrics, jax.eval_shape(tx.init, PARAMS))
    inside = jax.jit(gj.metrics)(state)
    assert jax.tree.structure(inside) == jax.tree.structure(shapes)
    for name, seen in gj.metrics(state).items():
        for one, other, shape in zip(seen, inside[name], shapes[name], strict=True):
            np.testing.assert_array_equal(one, other)
            assert (one.shape, one.dtype) == (shape.shape, shape.dtype)


@pytest.mark.parametrize("read", [gj.metrics, jax.jit(gj.metrics)], ids=["eager", "jit"])
def test_they_outlive_a_state_that_is_donated(read):
    tx = lens(refresh=1)
    gradient = next(wandering(1))
    state = tx.init(PARAMS)
    seen = read(state)
    after = jax.jit(lambda state: tx.update(gradient, state)[1], donate_argnums=0)(state)
    assert state.refresh_state.refreshes["tall"].is_deleted()
    assert int(seen["tall"].refreshes) == 0 and int(read(after)["tall"].refreshes) == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_state_in_shards_tells_the_same(kind):
    """Both axes of a matrix in shards: an overlap is a sum over devices."""
    params = {"w": jnp.zeros((16, 8))}
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    sharding = {"w": NamedSharding(mesh, P("data", "model"))}
    tx = gj.galore_lion(1e-2, RANK, update_proj_gap=1, projector=projectors.subspace_iteration())
    gradients = list(wandering(3, params))
    plain = gj.metrics(states(tx, gradients, params)[-1])["w"]
    placed = jax.device_put(params, sharding)
    state, update = gj.init_sharded(tx, placed, sharding), jax.jit(tx.update)
    assert state[0].projectors["w"].sharding.spec[0] == "model"
    for gradient in gradients:
        state = update(jax.device_put(gradient, sharding), state, placed)[1]
    for read in (gj.metrics, jax.jit(gj.metrics)):
        seen = read(state)["w"]
        assert int(seen.refreshes) == int(plain.refreshes) == 3
        assert 0 < float(plain.overlap) < 0.999
        np.testing.assert_allclose(seen.overlap, plain.overlap, atol=1e-4)


def test_models_side_by_side():
    """vmap: each model of a batch has numbers of its own."""
    params = {"tall": PARAMS["tall"]}
    tx = lens(refresh=1, projector=projectors.svd())
    pairs = zip(*(wandering(3, params, seed) for seed in range(2)), strict=True)
    state = jax.vmap(lambda _: tx.init(params))(jnp.arange(2))
    update = jax.jit(jax.vmap(tx.update))
    for gradient in [jax.tree.map(lambda *g: jnp.stack(g), *pair) for pair in pairs]:
        state = update(gradient, state)[1]
    seen = jax.vmap(gj.metrics)(state)["tall"]
    for seed in range(2):
        alone = gj.metrics(states(tx, wandering(3, params, seed), params)[-1])["tall"]
        np.testing.assert_allclose(seen.overlap[seed], alone.overlap, atol=1e-5)
    assert abs(seen.overlap[0] - seen.overlap[1]) > 1e-3
