"""Gradients that are local to each device: the same steps, from rank-sized reductions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_jax as gj
from galore_jax import projectors
from galore_jax.transforms.state import low_rank_states

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction

DEVICES, STEPS, GAP = 8, 8, 3
PARAMS = {
    "tall": jnp.zeros((48, 24)),
    "wide": jnp.zeros((24, 48)),
    "square": jnp.zeros((32, 32)),
    "stack": jnp.zeros((3, 24, 40)),
    "norm": jnp.zeros((24,)),
}
OPTIONS = {"rank": 6, "axes": gj.MatrixAxes(), "update_proj_gap": GAP}


def draw(seed):
    """One gradient per device, ``[devices, ...]``, of a signal that drifts and local noise."""
    rng, signal = np.random.default_rng(seed), np.random.default_rng(7)

    def leaf(p):
        common = signal.normal(size=p.shape) + 0.3 * rng.normal(size=p.shape)
        return jnp.asarray(common + 0.5 * rng.normal(size=(DEVICES, *p.shape)), jnp.float32)

    return {name: leaf(p) for name, p in PARAMS.items()}


def averaged(gradients):
    return {name: g.mean(0) for name, g in gradients.items()}


def by_shard_map(tx, *, kind=AxisType.Auto, check_vma=True):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))

    def local(gradients, state):
        return tx.update(jax.tree.map(lambda g: g[0], gradients), state, PARAMS)

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P(), check_vma=check_vma
    )

    @jax.jit
    def update(gradients, state):
        if kind is AxisType.Auto:
            return mapped(gradients, state)
        return mapped(*jax.reshard((gradients, state), (P("data"), P())))

    return update if kind is AxisType.Auto else on(mesh, update)


def on(mesh, update):
    def placed(gradients, state):
        with jax.set_mesh(mesh):
            gradients = jax.device_put(gradients, NamedSharding(mesh, P("data")))
            return update(gradients, jax.device_put(state, NamedSharding(mesh, P())))

    return placed


def by_pmap(tx):
    mapped = jax.pmap(lambda g, s: tx.update(g, s, PARAMS), axis_name="data")

    def update(gradients, state):
        if np.ndim(state[0].count) == 0:
            state = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), state)
        updates, state = mapped(gradients, state)
        for x in jax.tree.leaves((updates, state)):
            np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
        return jax.tree.map(lambda x: x[0], updates), state

    return update


WAYS = {
    "shard_map": by_shard_map,
    "shard_map, unchecked": lambda tx: by_shard_map(tx, check_vma=False),
    "shard_map, explicit": lambda tx: by_shard_map(tx, kind=AxisType.Explicit),
    "pmap": by_pmap,
}
EXACT = {"projector": projectors.svd(), "transport": gj.transport.keep()}
KINDS = {
    "sgd": lambda **o: gj.galore_sgd(1e-2, **OPTIONS, **o),
    "adamw": lambda **o: gj.galore_adamw(1e-2, **OPTIONS, weight_decay=0.1, **o),
    "adamw, long": lambda **o: gj.galore_adamw(1e-2, **OPTIONS, side="long", **o),
    "rotate": lambda **o: gj.galore_adamw(1e-2, **OPTIONS, transport=gj.transport.rotate(), **o),
    "subspace iteration": lambda **o: gj.galore_sgd(
        1e-2, **OPTIONS, projector=projectors.subspace_iteration(2), **o
    ),
    "random": lambda **o: gj.galore_sgd(
        1e-2, **OPTIONS, projector=projectors.random_orthonormal(), **o
    ),
    "svd": lambda **o: gj.galore_sgd(1e-2, **OPTIONS, **EXACT, **o),
    "gram_eigh": lambda **o: gj.galore_sgd(1e-2, **OPTIONS, projector=projectors.gram_eigh(), **o),
    "adafactor": lambda **o: gj.galore_adafactor(1e-2, **OPTIONS, **o),
    "lion": lambda **o: gj.galore_lion(1e-2, **OPTIONS, **o),
    "8 bits": lambda **o: gj.galore_adamw8bit(1e-2, **OPTIONS, **o),
    "adaptive": lambda **o: gj.galore_sgd(
        1e-2, **OPTIONS | {"update_proj_gap": gj.refresh.adaptive(1, patience=1)}, **o
    ),
}
CASES = [(way, name) for way in WAYS for name in ("sgd", "adamw")] + [
    ("shard_map", name) for name in KINDS if name not in ("sgd", "adamw")
]


@pytest.mark.parametrize("way, name", CASES)
@pytest.mark.sampled(4)
def test_equals_reducing_the_gradient_first(way, name):
    local, reference = WAYS[way](KINDS[name](axis_name="data")), KINDS[name]()
    update = jax.jit(reference.update)
    state = expected_state = reference.init(PARAMS)
    # Lion takes signs, 8-bit codes may tip where a sum is taken in another order.
    tolerance = {"adamw": 1e-4, "adamw, long": 1e-4, "rotate": 1e-4, "8 bits": 2e-2, "lion": 5e-2}
    for step in range(STEPS):
        gradients = draw(step)
        updates, state = local(gradients, state)
        expected, expected_state = update(averaged(gradients), expected_state, PARAMS)
        for leaf in PARAMS:
            error = jnp.linalg.norm(updates[leaf] - expected[leaf])
            assert error <= tolerance.get(name, 1e-5) * jnp.linalg.norm(expected[leaf]), leaf
    ours, theirs = refreshes(state), refreshes(expected_state)
    for path, count in theirs.items():
        np.testing.assert_array_equal(np.reshape(ours[path], (-1, *count.shape))[0], count)
    assert max(count.max() for count in theirs.values()) >= 2


def refreshes(state):
    """How often each basis was recomputed, by path, over all lenses of a state."""
    trees = [lens.refresh_state.refreshes for lens in low_rank_states(state)]
    return {name: np.asarray(x) for tree in trees for name, x in tree.items() if not masked(x)}


def masked(node):
    return isinstance(node, optax.MaskedNode)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("way", ["shard_map", "pmap"])
@pytest.mark.sampled(1)
def test_what_one_device_alone_finds_unusable_is_unusable_to_all(way, value):
    """A device that went its own way would wait for the others for ever."""
    update = WAYS[way](KINDS["adamw"](axis_name="data"))
    state = KINDS["adamw"]().init(PARAMS)
    start = state[0].projectors
    bad = draw(0)
    bad["wide"] = bad["wide"].at[5, 3, 2].set(value)
    bad["stack"] = bad["stack"].at[2, 1].set(value)
    updates, state = update(bad, state)
    lens = jax.tree.map(lambda x: np.reshape(x, (-1, *x.shape[way == "pmap" :]))[0], state[0])
    np.testing.assert_array_equal(lens.projectors["wide"], start["wide"])
    np.testing.assert_array_equal(lens.projectors["stack"][1], start["stack"][1])
    np.testing.assert_array_equal(lens.refresh_state.due["stack"], [False, True, False])
    assert lens.refresh_state.refreshes["tall"] == 1 and np.isfinite(updates["tall"]).all()
    assert not np.isfinite(updates["wide"]).all()
    updates, state = update(draw(1), state)
    lens = jax.tree.map(lambda x: np.reshape(x, (-1, *x.shape[way == "pmap" :]))[0], state[0])
    assert lens.refresh_state.refreshes["wide"] == 1
    np.testing.assert_array_equal(lens.refresh_state.refreshes["stack"], [1, 1, 1])


def test_a_zero_gradient_on_some_devices_is_no_obstacle():
    update = by_shard_map(KINDS["sgd"](axis_name="data"))
    gradients = jax.tree.map(lambda g: g.at[:7].set(0), draw(0))
    _, state = update(gradients, KINDS["sgd"]().init(PARAMS))
    assert state[0].refresh_state.refreshes["tall"] == 1
    _, state = update(jax.tree.map(jnp.zeros_like, gradients), KINDS["sgd"]().init(PARAMS))
    assert state[0].refresh_state.refreshes["tall"] == 0


@pytest.mark.parametrize("projector", [projectors.randomized_svd(), projectors.svd()], ids=str)
@pytest.mark.sampled(1)
def test_a_basis_from_sketches_has_the_energy_of_one_from_the_gradient(projector):
    make = lambda **o: gj.galore_sgd(1e-2, **OPTIONS, projector=projector, **o)  # noqa: E731
    gradients = draw(3)
    mean = averaged(gradients)
    _, ours = by_shard_map(make(axis_name="data"))(gradients, make().init(PARAMS))
    _, theirs = jax.jit(make().update)(mean, make().init(PARAMS), PARAMS)
    for plan in gj.views.leaf_plan(ours[0].config, PARAMS):
        if plan.view is not None:
            energy = [
                jnp.sum(plan.view.project(mean[plan.path], s[0].projectors[plan.path]) ** 2)
                for s in (ours, theirs)
            ]
            assert energy[0] > 0.99 * energy[1]


def reductions(text):
    """Sizes of all arrays that are reduced or gathered, per computation of the program."""
    found, name = {}, ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.split()[0]
        match = re.search(r"= (.*?) (?:all-reduce|all-gather)(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [int(np.prod([int(n) for n in s.split(",") if n] or [1])) for s in shapes]
            found.setdefault(name, []).extend(sizes)
    return found


def test_only_rank_sized_arrays_are_reduced():
    tx = gj.galore_adamw(1e-2, axis_name="data", **OPTIONS)
    text = by_shard_map(tx).lower(draw(0), tx.init(PARAMS)).compile().as_text()
    found = reductions(text)
    largest = max(max(sizes) for sizes in found.values())
    rank = OPTIONS["rank"]
    # R of the stack of layers, all at once; a sketch is of one matrix.
    assert largest == 3 * 40 * rank
    ordinary = max(found.values(), key=sum)
    kept = {"tall": 48, "wide": 48, "square": 32, "stack": 3 * 40}
    assert sum(ordinary) == rank * sum(kept.values()) + 24  # and the norm at its full size
    # The positive control: a full factorization needs the gradient.
    tx = gj.galore_adamw(1e-2, axis_name="data", **OPTIONS, **EXACT)
    text = by_shard_map(tx).lower(draw(0), tx.init(PARAMS)).compile().as_text()
    assert max(max(sizes) for sizes in reductions(text).values()) >= 48 * 24


@pytest.mark.parametrize("bad", [3, ["data", 1], object()])
def test_an_axis_name_is_a_name(bad):
    with pytest.raises(TypeError, match="axis_name"):
        gj.galore_sgd(1e-2, axis_name=bad)


def test_several_axes_and_inject_hyperparams():
    make = optax.inject_hyperparams(gj.galore_sgd, static_args=gj.STATIC_ARGS)
    tx = make(learning_rate=1e-2, axis_name=("data", "fsdp"), **OPTIONS)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    update = jax.shard_map(
        lambda g, s: tx.update(jax.tree.map(lambda x: x[0], g), s, PARAMS),
        mesh=mesh,
        in_specs=(P(("data", "fsdp")), P()),
        out_specs=P(),
    )
    updates, _ = jax.jit(update)(draw(0), tx.init(PARAMS))
    expected, _ = gj.galore_sgd(1e-2, **OPTIONS).update(
        averaged(draw(0)), gj.galore_sgd(1e-2, **OPTIONS).init(PARAMS), PARAMS
    )
    np.testing.assert_allclose(updates["stack"], expected["stack"], atol=1e-5)
