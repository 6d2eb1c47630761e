"""Windows of micro-batches whose gradients, parameters or states lie on several devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from windows import (
    EVERY,
    KINDS,
    PARAMS,
    SHAPES,
    WIDE,
    Compiled,
    adamw,
    assert_close,
    assert_same_bits,
    compiled,
    draw,
    leaves_of,
    sgd,
    window,
)

import galore_jax as gj
from galore_jax.transforms.state import low_rank_states

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction


# Gradients that are local to each device

DEVICES = 8


def draw_local(seed):
    """``[devices, ...]``."""
    draws = [draw(1000 * seed + device) for device in range(DEVICES)]
    return jax.tree.map(lambda *gs: jnp.asarray(np.stack(gs)), *draws)


def local_mean(gradients):
    return jnp.asarray(np.mean(np.asarray(gradients), 0))


def stacked(trees):
    return jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs, 1)), *trees)


def reduced_first(gradients):
    """Updates of windows of three."""
    ours = Compiled(gj.accumulate(adamw(), 3))
    state, emitted = None, []
    for i in range(0, len(gradients), 3):
        means = [jax.tree.map(local_mean, g) for g in gradients[i : i + 3]]
        updates, state = ours.run(means, state)
        emitted.append(updates)
    return emitted, state


def test_pmap_keeps_local_sums_and_equals_reducing_first():
    tx = gj.accumulate(adamw(axis_name="data"), 3)
    gradients = [draw_local(seed) for seed in range(6)]
    update = jax.pmap(lambda g, s: tx.update(g, s, PARAMS), axis_name="data")
    state = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), jax.jit(tx.init)(PARAMS))
    emitted = []
    for i, gradient in enumerate(gradients):
        updates, state = update(gradient, state)
        if i % 3 == 1:
            assert all(np.min(np.ptp(np.asarray(x), axis=0)) > 0 for x in state.sums.values())
        shared = updates, state.opt_state, state.projectors, state.moved, state.mini_step
        for x in leaves_of(shared):
            np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
        if i % 3 == 2:
            emitted.append(jax.tree.map(lambda x: x[0], updates))
    expected, expected_state = reduced_first(gradients)
    assert_close(emitted, expected, 1e-5)
    first = jax.tree.map(lambda x: x[0], state.opt_state)
    for lens, other in zip(low_rank_states(first), low_rank_states(expected_state), strict=True):
        assert_same_bits(lens.refresh_state, other.refresh_state)
        assert_close(lens.projectors, other.projectors, 1e-5)


def mesh_of_devices():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def by_shard_map(fn, check_vma):
    spec = jax.sharding.PartitionSpec
    return jax.shard_map(
        lambda gradients, state: fn(jax.tree.map(lambda g: g[0], gradients), state),
        mesh=mesh_of_devices(),
        in_specs=(spec("data"), spec()),
        out_specs=spec(),
        check_vma=check_vma,
    )


@pytest.mark.parametrize("way", ["checked", "checked, local sums", "unchecked"])
@pytest.mark.sampled(1)
def test_a_scan_in_a_shard_map_equals_reducing_first(way):
    tx = gj.accumulate(adamw(axis_name="data"), 3)

    def step(carry, gradient):
        updates, state = tx.update(gradient, carry[1], PARAMS)
        return (jax.tree.map(jnp.add, carry[0], updates), state), None

    def local(gradients, state):
        begun = state
        if way == "checked, local sums":
            state = state._replace(sums=jax.lax.pcast(state.sums, "data", to="varying"))
        zeros = jax.tree.map(jnp.zeros_like, PARAMS)
        (updates, state), _ = jax.lax.scan(step, (zeros, state), gradients)
        return updates, state._replace(sums=begun.sums)

    run = jax.jit(by_shard_map(local, check_vma=way != "unchecked"))
    gradients = [draw_local(seed) for seed in range(6)]
    expected, expected_state = reduced_first(gradients)
    state = jax.jit(tx.init)(PARAMS)
    for i in range(2):
        updates, state = run(stacked(gradients[3 * i : 3 * i + 3]), state)
        assert_close(updates, expected[i], 1e-5)
    for lens, other in zip(low_rank_states(state), low_rank_states(expected_state), strict=True):
        assert_close(lens.inner_state, other.inner_state, 1e-5)


def test_what_one_device_finds_not_finite_is_so_for_all():
    tx = gj.accumulate(sgd(axis_name="data"), 3)
    update = jax.jit(by_shard_map(lambda g, s: tx.update(g, s, PARAMS), check_vma=False))
    state = jax.jit(tx.init)(PARAMS)
    bad = draw_local(0)
    bad["tall"] = bad["tall"].at[5, 1, 1].set(jnp.inf)
    for gradient in (bad, draw_local(1), draw_local(2)):
        updates, state = update(gradient, state)
    (lens,) = low_rank_states(state)
    assert lens.refresh_state.refreshes["tall"] == 0 and lens.refresh_state.due["tall"]
    assert np.isfinite(updates["stack"]).all() and not np.isfinite(updates["tall"]).all()
    for seed in (3, 4, 5):
        updates, state = update(draw_local(seed), state)
    (lens,) = low_rank_states(state)
    assert lens.refresh_state.refreshes["tall"] == 1 and np.isfinite(updates["tall"]).all()


def reductions(text):
    """Sizes of all arrays that are reduced or gathered, per computation of the program."""
    found, name = {}, ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.split()[0]
        match = re.search(r"= (.*?) all-(?:reduce|gather|to-all)(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [int(np.prod([int(n) for n in s.split(",") if n] or [1])) for s in shapes]
            found.setdefault(name, []).extend(sizes)
    return found


@pytest.mark.parametrize("way", ["shard_map", "pmap"])
def test_one_reduction_of_the_size_of_a_moment_per_window(way):
    tx = gj.accumulate(gj.galore_adamw(1e-2, rank=3, axis_name="data"), 3)
    gradients = {"w": jnp.ones((DEVICES, 24, 40))}

    def program(mini_step):
        def update(gradients, state):
            if mini_step is not None:
                state = state._replace(mini_step=jnp.full((), mini_step, jnp.int32))
            return tx.update(gradients, state, WIDE)

        state = jax.eval_shape(tx.init, WIDE)
        if way == "shard_map":
            mapped = jax.jit(by_shard_map(update, check_vma=False))
        else:
            mapped = jax.pmap(update, axis_name="data", in_axes=(0, None))
        return reductions(mapped.lower(gradients, state).compile().as_text())

    assert program(1) == {}
    (last,) = program(2).values()
    assert last == [40 * 3]
    sketches = [size for sizes in program(0).values() for size in sizes]
    assert sketches and max(sketches) < 24 * 40 / 2
    whole = program(None)
    assert sorted(size for sizes in whole.values() for size in sizes) == sorted([*last, *sketches])
    assert not any(name in ("ENTRY", "HloModule") for name in whole)  # in conditionals only


def test_parameters_of_each_device_its_own():
    """No axis to reduce over, but all arrays vary over one: zeros have to as well."""
    spec = jax.sharding.PartitionSpec("data")
    tx = gj.accumulate(sgd(), 2)

    def local(gradients, state):
        gradients, state = jax.tree.map(lambda x: x[0], (gradients, state))
        updates, state = tx.update(gradients, state, gradients)
        return jax.tree.map(lambda x: x[None], (updates, state))

    update = jax.jit(
        jax.shard_map(local, mesh=mesh_of_devices(), in_specs=(spec, spec), out_specs=spec)
    )
    state = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), jax.jit(tx.init)(PARAMS))
    _, state = update(draw_local(0), state)
    updates, state = update(draw_local(1), state)
    alone = Compiled(tx)
    for device in (0, 5):
        mine = [jax.tree.map(lambda x, d=device: x[d], draw_local(seed)) for seed in (0, 1)]
        expected, _ = alone.run(mine)
        assert_close(jax.tree.map(lambda x, d=device: x[d], updates), expected, 1e-5)


# On a mesh


SPECS = {
    "heads": (None, "model"),
    "norm": ("data",),
    "stack": (None, "data"),
    "tall": ("data", "model"),
}


def on_mesh(kind):
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(kind,) * 2, devices=jax.devices()[:4]
    )
    named = jax.sharding.NamedSharding
    return {k: named(mesh, jax.sharding.PartitionSpec(*spec)) for k, spec in SPECS.items()}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.sampled(1)
def test_the_same_numbers_on_a_mesh(kind):
    sharding = on_mesh(getattr(jax.sharding.AxisType, kind))
    _, ours = compiled("adamw")
    tx = gj.accumulate(KINDS["adamw"](), EVERY)
    params = jax.device_put(PARAMS, sharding)
    state = gj.init_sharded(tx, params, sharding)
    update = jax.jit(tx.update, out_shardings=(sharding, jax.tree.map(lambda x: x.sharding, state)))
    expected, expected_state = ours.run([*window(0), *window(1)])
    for gradient in [*window(0), *window(1)]:
        updates, state = update(jax.device_put(gradient, sharding), state, params)
    assert_close(jax.device_get(updates), expected, 1e-5)
    assert_close(jax.device_get(state.opt_state), expected_state.opt_state, 1e-5)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("name", ["adamw", "q-galore", "partition"])
def test_sums_are_sharded_like_moments_and_bases_like_bases(name, spread):
    sharding = on_mesh(jax.sharding.AxisType.Auto)
    tx = KINDS[name]()
    state = gj.state_sharding(gj.accumulate(tx, EVERY), PARAMS, sharding, spread=spread)
    inner = gj.state_sharding(tx, PARAMS, sharding, spread=spread)
    assert state.opt_state == inner
    assert state.mini_step.is_fully_replicated
    assert all(x.is_fully_replicated for x in leaves_of(state.moved))
    assert state.sums["norm"].spec == sharding["norm"].spec
    assert state.projectors["norm"].is_fully_replicated
    bases = {}
    for lens in low_rank_states(inner):
        bases |= {path: x for path, x in lens.projectors.items() if leaves_of(x)}
    for leaf in ("heads", "stack", "tall"):
        assert state.projectors[leaf] == bases[leaf]
    # Like a moment: tall [10, 6] keeps its rows, stack [3, 6, 8] its columns.
    like = gj.state_sharding(adamw(), PARAMS, sharding, spread=spread)[0].inner_state.mu
    for leaf in SHAPES:
        assert state.sums[leaf] == like[leaf]
    assert next(iter(state.sums["tall"].spec)) == "data"
    assert tuple(state.sums["stack"].spec) == (None, "data" if spread else None, None)


def test_a_window_inside_a_mask_is_sharded_too():
    sharding = on_mesh(jax.sharding.AxisType.Auto)
    mask = {name: name != "heads" for name in SHAPES}
    ours = gj.state_sharding(gj.accumulate(adamw(), 2), PARAMS, sharding)
    tx = optax.masked(gj.accumulate(adamw(), 2), mask)
    masked = gj.state_sharding(tx, PARAMS, sharding)
    assert jax.tree.structure(masked) == jax.tree.structure(jax.eval_shape(tx.init, PARAMS))
    for tree in ("sums", "projectors", "moved"):
        found = getattr(masked.inner_state, tree)
        for name in ("norm", "stack", "tall"):
            assert found[name] == getattr(ours, tree)[name]
