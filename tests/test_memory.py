"""Bytes by role and by leaf: of states that exist, and of those that would."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_jax as gj

PARAMS = {
    "embed": jnp.ones((100, 64)),
    "up": jnp.ones((64, 256), jnp.bfloat16),
    "norm": jnp.ones((64,)),
}
OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "galore": gj.galore_adamw(1e-2, rank=8),
    "8-bit": gj.galore_adamw8bit(1e-2, rank=8),
    "q-galore": gj.q_galore_adamw8bit(1e-2, rank=8),
    "adafactor": gj.galore_adafactor(1e-2, rank=8),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), gj.galore_lion(1e-3, rank=8)),
    "accumulated": gj.accumulate(gj.galore_adamw(1e-2, rank=8), 4),
    "guarded": gj.apply_if_finite(gj.galore_adamw(1e-2, rank=8), 4),
    "partition": optax.partition(
        {"lens": gj.galore_adamw(1e-2, rank=8), "plain": optax.adam(1e-3)},
        {"embed": "plain", "up": "lens", "norm": "plain"},
    ),
}
ROLES = ("weights", "projectors", "moments", "full_rank", "refresh", "other")


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def roles(memory):
    return {role: getattr(memory, role) for role in ROLES}


@pytest.mark.parametrize("quantized", [False, True], ids=["full", "int8"])
@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_estimate_is_what_the_state_takes(tx, quantized):
    params = gj.quant.quantize_params(PARAMS) if quantized else PARAMS
    state = tx.init(gj.quant.dequantize_params(params))
    memory = gj.memory.estimate(tx, params)
    assert memory == gj.memory.report(state, params)
    assert memory.weights == nbytes(params)
    assert memory.state == nbytes(state)
    assert memory.total == nbytes((params, state))


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_leaves_sum_up_to_roles(tx):
    memory = gj.memory.estimate(tx, PARAMS)
    assert [leaf.path for leaf in memory.leaves] == ["embed", "norm", "up", None]
    for role, size in roles(memory).items():
        assert sum(getattr(leaf, role) for leaf in memory.leaves) == size
    for leaf in memory.leaves[:-1]:
        assert leaf.shape == PARAMS[leaf.path].shape
        assert leaf.weights == PARAMS[leaf.path].nbytes
    # All of a state but its counts is somebody's.
    assert 0 < memory.leaves[-1].total < 64


def test_roles():
    memory = gj.memory.estimate(OPTIMIZERS["galore"], PARAMS)
    assert memory.projectors == 64 * 8 * 4 + 2 * 4  # and a scalar for each of the other leaves
    assert memory.moments == 2 * 4 * 256 * 8
    assert memory.full_rank == 2 * 4 * (100 * 64 + 64)
    assert memory.other == 4 + 4  # the counts of the lens and of Adam
    adam = gj.memory.estimate(OPTIMIZERS["adam"], PARAMS)
    assert (adam.projectors, adam.moments, adam.refresh) == (0, 0, 0)
    assert adam.full_rank == 2 * nbytes(PARAMS)


@pytest.mark.parametrize("name", ["mu", "0/mu", "inner_state"])
def test_names_of_parameters_mislead_nobody(name):
    """The first moment of `w` lies at `.../mu/w`, which is the path of another parameter."""
    mu, w = jnp.ones((3, 5)), jnp.ones((7, 11))
    params = {name: {"w": mu}, "w": w}
    for tx in (optax.adam(1e-3), gj.galore_adamw(1e-2, rank=64)):
        by_path = {leaf.path: leaf for leaf in gj.memory.estimate(tx, params).leaves}
        assert by_path[f"{name}/w"].full_rank == 2 * mu.nbytes
        assert by_path["w"].full_rank == 2 * w.nbytes


@pytest.mark.parametrize("tx", [OPTIMIZERS["adam"], OPTIMIZERS["galore"]], ids=["adam", "galore"])
def test_parameters_that_are_one_array(tx):
    w = jnp.ones((64, 256))
    leaf, rest = gj.memory.estimate(tx, w).leaves
    kept = 256 * 8 * 4 if tx is OPTIMIZERS["galore"] else w.nbytes
    assert leaf.moments + leaf.full_rank == 2 * kept
    assert rest.state == rest.refresh + rest.other < 32  # scalars


def test_the_window_of_accumulated_gradients_is_not_the_optimizer():
    alone, window = (
        roles(gj.memory.estimate(OPTIMIZERS[x], PARAMS)) for x in ("galore", "accumulated")
    )
    other = window.pop("other") - alone.pop("other")
    assert alone == window
    assert other >= 4 * (100 * 64 + 64 + 256 * 8)  # sums of gradients


def test_nothing_is_allocated():
    shapes = {"w": jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)}
    assert gj.memory.estimate(gj.galore_adamw(1e-2, rank=8), shapes).weights == 2**42


def test_it_prints():
    memory = gj.memory.estimate(OPTIMIZERS["q-galore"], PARAMS)
    assert [line.rsplit(maxsplit=2)[0] for line in str(memory).splitlines()] == [
        "weights",
        "projectors",
        "moments",
        "full rank",
        "refresh",
        "other",
        "total",
    ]


def test_it_prints_leaves():
    memory = gj.memory.estimate(OPTIMIZERS["adam"], PARAMS)
    header, *rows = memory.by_leaf().splitlines()
    assert header.split() == ["path", "shape", "weights", "full", "rank", "other", "total"]
    assert [row.split()[0] for row in rows] == ["embed", "norm", "up", "(of", "total"]
    assert rows[0].split() == [
        "embed",
        "(100,64)",
        "25.6",
        "kB",
        "51.2",
        "kB",
        "0",
        "B",
        "76.8",
        "kB",
    ]


def test_values_are_equal_and_frozen():
    one, two = (gj.memory.estimate(OPTIMIZERS["galore"], PARAMS) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.weights = 0
