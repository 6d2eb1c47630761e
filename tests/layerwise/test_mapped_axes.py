"""With gradients of its own on every device, the step of one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stacked_model as sm
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import galore_jax as gj
from galore_jax import layerwise

pytestmark = pytest.mark.standard_promotion

DEVICES, STEPS = 8, 6
LENS = {"rank": 4, "axes": gj.MatrixAxes(-2, -1), "update_proj_gap": 4}
PARTS = {"embed": "full", "blocks": "low", "norm": "full", "lm_head": "full"}


def sgd(**options):
    return gj.galore_sgd(1e-1, momentum=0.9, **LENS, **options)


KINDS = {
    "sgd": sgd,
    "adamw": lambda **o: gj.galore_adamw(1e-2, weight_decay=0.1, **LENS, **o),
    "accumulated": lambda **o: gj.accumulate(sgd(**o), 2),
    # Only the lens in the blocks knows the axis.
    "partition": lambda **o: optax.partition({"low": sgd(**o), "full": optax.sgd(1e-1)}, PARTS),
}


def rows(count=STEPS):
    """Two sequences for each device."""
    return jnp.split(jnp.concatenate(sm.batches(4 * count)), count)


def by_shard_map(step, check_vma=True):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P(), P("data"), P()), "out_specs": P()}
    return jax.jit(jax.shard_map(step, mesh=mesh, check_vma=check_vma, **specs))


def by_pmap(step):
    """All results of all devices, which must be equal."""
    mapped = jax.pmap(step, axis_name="data")

    def stepped(params, opt_state, tokens, key):
        del key
        copies = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), (params, opt_state))
        results = jax.device_get(mapped(*copies, tokens.reshape(DEVICES, 2, -1)))
        for x in jax.tree.leaves(results):
            np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
        return jax.tree.map(lambda x: x[0], results)

    return stepped


def pair(name, pullback="full", **options):
    """The step of one device, and the one inside a mapped axis."""
    alone, together = KINDS[name](), KINDS[name](axis_name="data")
    options = sm.PULLBACKS[pullback] | options
    return (
        alone.init(sm.initial()),
        layerwise.train_step(*sm.MODEL, alone, **options),
        layerwise.train_step(*sm.MODEL, together, **options),
    )


@pytest.mark.parametrize(
    "name, pullback",
    [("sgd", "full"), ("adamw", "projected"), ("accumulated", "projected"), ("partition", "full")],
)
@pytest.mark.sampled(1)
def test_the_same_as_on_one_device(name, pullback):
    state, alone, together = pair(name, pullback)
    expected, expected_state, losses = sm.run(alone, sm.initial(), state, rows())
    found, found_state, our_losses = sm.run(by_shard_map(together), sm.initial(), state, rows())
    np.testing.assert_allclose(our_losses, losses, rtol=1e-5)
    assert losses[-1] < losses[0]
    assert sm.distance(found, expected) < 1e-5
    theirs, ours = sm.by_path(expected_state), sm.by_path(found_state)
    refreshes = [path for path in theirs if "refreshes" in path and "kernel" in path]
    assert refreshes
    for path in refreshes:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
    assert max(np.max(theirs[path]) for path in refreshes) >= (1 if name == "accumulated" else 2)


@pytest.mark.parametrize("way", ["unchecked", "pmap"])
@pytest.mark.sampled(1)
def test_where_nobody_keeps_track_of_what_varies(way):
    state, alone, together = pair("accumulated", "projected")
    expected, _, _ = sm.run(alone, sm.initial(), state, rows())
    if way == "unchecked":
        found, _, _ = sm.run(by_shard_map(together, False), sm.initial(), state, rows())
    else:
        # Sums of a window are local until it ends, so that here each step is one.
        state, alone, together = pair("partition", "full")
        expected, _, _ = sm.run(alone, sm.initial(), state, rows(3))
        step, found = by_pmap(together), sm.initial()
        for tokens in rows(3):
            found, state, _ = step(found, state, tokens, None)
    assert sm.distance(found, expected) < 1e-5


@pytest.mark.parametrize("pullback", sm.PULLBACKS)
@pytest.mark.sampled(1)
def test_exact_clipping_is_by_the_norm_of_the_mean(pullback):
    state, alone, together = pair("sgd", pullback, clip_norm=0.3)
    params, expected = (sm.initial(),) * 2
    alone, together, theirs = jax.jit(alone), by_shard_map(together), state
    for tokens in rows(3):
        params, state, ours = together(params, state, tokens, None)
        expected, theirs, metrics = alone(expected, theirs, tokens)
        np.testing.assert_allclose(ours.grad_norm, metrics.grad_norm, rtol=1e-5)
        assert metrics.grad_norm > 0.3
    assert sm.distance(params, expected) < 1e-5


def test_the_norm_without_clipping_bounds_that_of_the_mean():
    state, alone, together = pair("sgd")
    tokens = rows(1)[0]
    _, _, ours = by_shard_map(together)(sm.initial(), state, tokens, None)
    _, _, exact = jax.jit(alone)(sm.initial(), state, tokens)
    locally = [optax.tree.norm(jax.grad(sm.loss_fn)(sm.initial(), part))
               for part in jnp.split(tokens, DEVICES)]  # fmt: skip
    np.testing.assert_allclose(ours.grad_norm, np.sqrt(np.mean(np.square(locally))), rtol=1e-5)
    assert ours.grad_norm > exact.grad_norm


def test_who_averages_what_the_head_returns():
    tx = sgd(axis_name="data")

    def with_aux(params, x, tokens):
        count = jax.lax.psum(tokens.size, "data")
        return sm.head(params, x, tokens), {"first": jnp.float32(tokens[0, 0]), "count": count}

    step = layerwise.train_step(sm.embed, sm.block, with_aux, tx, has_aux=True)
    tokens = rows(1)[0]
    _, _, metrics = by_shard_map(step)(sm.initial(), tx.init(sm.initial()), tokens, None)
    np.testing.assert_allclose(metrics.aux["first"], np.mean(tokens[::2, 0]), rtol=1e-6)
    assert metrics.aux["count"] == tokens.size
    np.testing.assert_allclose(metrics.loss, sm.loss_fn(sm.initial(), tokens), rtol=1e-6)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.sampled(1)
def test_what_is_not_finite_on_one_device_is_skipped_on_all(clip_norm):
    """The third block of the sixth device sends a NaN back; else a collective would be missed."""

    @jax.custom_vjp
    def poison(x, bad):
        del bad
        return x

    poison.defvjp(lambda x, bad: (x, bad), lambda bad, dx: (jnp.where(bad, jnp.nan, dx), None))

    def embed(params, tokens):
        return sm.embed(params, tokens), jnp.zeros((), jnp.float32) * tokens[0, 0]

    def block(layer, x):
        bad = (x[1] == 2) & (jax.lax.axis_index("data") == 5)
        return poison(sm.block(layer, x[0]), bad), x[1] + 1

    def head(params, x, tokens):
        return sm.head(params, x[0], tokens)

    tx = sgd(axis_name="data")
    step = layerwise.train_step(embed, block, head, tx, clip_norm=clip_norm)
    params, state = sm.initial(), tx.init(sm.initial())
    new, new_state, metrics = by_shard_map(step)(params, state, rows(1)[0], None)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((new, new_state)))
    before, after = params["blocks"]["up"]["kernel"], new["blocks"]["up"]["kernel"]
    moved = [not np.array_equal(*pair) for pair in zip(before, after, strict=True)]
    if clip_norm is None:
        assert metrics.skipped == 4 and moved == [False] * 3 + [True]
        assert np.any(new["lm_head"]["kernel"] != params["lm_head"]["kernel"])
    else:
        assert metrics.skipped == sm.LAYERS + 1 and not any(moved)


def reduced(program):
    """Sizes of all arrays that are reduced or gathered."""
    found = re.findall(r"= (.*?) (?:all-reduce|all-gather)(?:-start)?\(", program.as_text())
    shapes = [shape for result in found for shape in re.findall(r"\w+\[([\d,]*)\]", result)]
    return [int(np.prod([int(n) for n in shape.split(",") if n] or [1])) for shape in shapes]


@pytest.mark.parametrize("pullback", sm.PULLBACKS)
@pytest.mark.sampled(1)
def test_of_a_block_only_what_has_the_size_of_its_rank_is_reduced(pullback):
    kernel = sm.WIDTH * sm.HIDDEN
    state, _, together = pair("sgd", pullback)
    arguments = sm.initial(), state, rows(1)[0], jax.random.key(0)
    sizes = reduced(by_shard_map(together).lower(*arguments).compile())
    # Embedding and head are not projected; theirs are the only larger ones, and once each.
    whole = sm.VOCAB * sm.WIDTH
    rank_sized = LENS["rank"] * sm.HIDDEN
    assert sorted(n for n in sizes if n > rank_sized) == [whole, whole]
    assert rank_sized in sizes
    if pullback == "full":
        # The positive control: the norm of the mean needs all of it.
        _, _, clipped = pair("sgd", clip_norm=0.3)
        sizes = reduced(by_shard_map(clipped).lower(*arguments).compile())
        assert sizes.count(kernel) >= 2
