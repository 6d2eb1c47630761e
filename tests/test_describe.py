"""The table of `describe`: rows, bytes, and transformations with lenses deep inside."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj

PARAMS = {
    "embed": jnp.zeros((50, 16)),
    "layers": {"up": jnp.zeros((3, 16, 40)), "scale": jnp.zeros((3, 16))},
    "down": jnp.zeros((40, 16), jnp.bfloat16),
    "bias": jnp.zeros((16,)),
    "step": jnp.zeros((), jnp.int32),
}
AXES = gj.MatrixAxes()
FLOAT = 4
# Adam keeps two fp32 arrays; a projected matrix adds its basis. A stack also has its own flags
# and counters: one byte and one int32 per matrix.
HAND = {
    "embed": 2 * 50 * 16 * FLOAT,
    "layers/up": 3 * (16 * 4 + 2 * 40 * 4) * FLOAT + 3 * (1 + 4),
    "layers/scale": 2 * 3 * 16 * FLOAT,
    "down": (16 * 4 + 2 * 40 * 4) * FLOAT,
    "bias": 2 * 16 * FLOAT,
    "step": 0,
}


def rows(tx, params=PARAMS):
    return {row.path: row for row in gj.describe(tx, params).rows}


def arrays(tx, params=PARAMS):
    """Bytes of everything in the state but scalars."""
    state = jax.eval_shape(tx.init, jax.eval_shape(lambda: params))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)


def test_rows():
    seen = rows(gj.galore_adamw(1e-2, 4, axes=AXES))
    assert list(seen) == ["bias", "down", "embed", "layers/scale", "layers/up", "step"]
    assert {path: row.state_bytes for path, row in seen.items()} == HAND
    outcome = {path: (row.projected, row.side, row.rank) for path, row in seen.items()}
    assert outcome == {
        "bias": (False, "", 0),
        "down": (True, "output", 4),
        "embed": (False, "", 0),
        "layers/scale": (False, "", 0),
        "layers/up": (True, "input", 4),
        "step": (False, "", 0),
    }
    assert seen["layers/up"].shape == (3, 16, 40)
    assert "embedding" in seen["embed"].reason and seen["down"].reason == "projected"


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "tx",
    [
        gj.galore_adamw(1e-2, 4, axes=AXES, codec=gj.codecs.cast("bfloat16"), side="long"),
        gj.galore_adamw(1e-2, 4, axes=AXES, weight_decay=0.1, state_dtype=jnp.bfloat16),
        gj.galore_lion(1e-2, 4),
        gj.galore_adafactor(1e-2, 4, axes=AXES),
        optax.chain(optax.clip_by_global_norm(1.0), gj.galore_sgd(1e-2, 4, momentum=0.9)),
        optax.apply_if_finite(gj.galore_adamw(1e-2, 4), 3),
        optax.inject_hyperparams(gj.galore_adamw, static_args=gj.STATIC_ARGS)(1e-2, rank=4),
        optax.MultiSteps(gj.galore_lion(1e-2, 4), 2).gradient_transformation(),
        optax.adamw(1e-2),
    ],
    ids=["cast", "bf16", "lion", "adafactor", "chain", "finite", "inject", "multi", "no lens"],
)
def test_every_byte_is_somebodys(tx):
    params = {name: leaf for name, leaf in PARAMS.items() if name != "step"}
    assert sum(row.state_bytes for row in rows(tx, params).values()) == arrays(tx, params)


def test_the_table():
    text = str(gj.describe(gj.galore_adamw(1e-2, 4, axes=AXES), PARAMS))
    lines = text.splitlines()
    assert lines[0].split() == ["path", "shape", "projected", "side", "rank", "state", "why"]
    assert len(lines) == 2 + len(HAND) + 1
    up = next(line for line in lines if line.startswith("layers/up"))
    assert "(3,16,40)" in up and "yes" in up and "input" in up and " 4 " in up
    total = sum(HAND.values())
    assert lines[-1].startswith("6 leaves") and f"{total / 1024:.1f} KiB" in lines[-1]
    assert len({line.index("yes") for line in lines if " yes " in line}) == 1  # columns line up


def test_abstract_parameters():
    tx = gj.galore_adamw(1e-2, 4, axes=AXES)
    huge = {"w": jax.ShapeDtypeStruct((80, 8192, 8192), jnp.bfloat16)}
    assert gj.describe(tx, huge).rows[0].state_bytes > 2**20
    assert gj.describe(tx, jax.eval_shape(lambda: PARAMS)) == gj.describe(tx, PARAMS)


def test_without_leaves():
    assert gj.describe(gj.galore_adamw(1e-2, 4), {}).rows == ()
    assert "0 leaves" in str(gj.describe(gj.galore_adamw(1e-2, 4), {}))


def test_without_a_lens():
    seen = rows(optax.adam(1e-2))
    assert not any(row.projected for row in seen.values())
    assert {row.reason for row in seen.values()} == {"not seen by a lens"}


def test_masked():
    mask = {"embed": False, "layers": True, "down": False, "bias": True, "step": False}
    seen = rows(optax.masked(gj.galore_adamw(1e-2, 4, axes=AXES), mask))
    assert seen["layers/up"].projected and not seen["down"].projected
    assert seen["down"].reason == seen["embed"].reason == "not seen by a lens"
    assert seen["down"].state_bytes == 0 and seen["layers/up"].state_bytes == HAND["layers/up"]


def test_several_lenses():
    tx = optax.partition(
        {"a": gj.galore_adamw(1e-2, 4, axes=AXES), "b": gj.galore_adamw(1e-2, 2, side="long")},
        {"embed": "b", "layers": "a", "down": "b", "bias": "a", "step": "a"},
    )
    seen = rows(tx)
    assert (seen["layers/up"].rank, seen["layers/up"].side) == (4, "input")
    assert (seen["down"].rank, seen["down"].side) == (2, "input")
    assert seen["down"].state_bytes == (40 * 2 + 2 * 16 * 2) * FLOAT


def test_a_lens_is_not_asked_about_leaves_it_does_not_see():
    """Its axes need not even exist in the others."""
    attention = gj.low_rank_projection(optax.trace(0.9), 2, axes=gj.MatrixAxes(0, (1, 2)))
    params = {"q": jnp.zeros((16, 2, 4)), "w": jnp.zeros((16, 24))}
    tx = optax.masked(attention, {"q": True, "w": False})
    tx.init(params)
    seen = rows(tx, params)
    assert seen["q"].projected and seen["w"].reason == "not seen by a lens"


def test_axes_by_leaf_name_under_a_mask_mean_what_they_mean_to_the_lens():
    tx = optax.masked(
        gj.low_rank_projection(
            optax.trace(0.9), 2, axes={"embed": gj.MatrixAxes(), "w": gj.MatrixAxes()}
        ),
        {"embed": True, "w": False},
    )
    params = {"embed": jnp.zeros((50, 16)), "w": jnp.zeros((16, 24))}
    projects = tx.init(params).inner_state.projectors["embed"].ndim == 2
    assert rows(tx, params)["embed"].projected == projects


def test_a_lone_array():
    row = gj.describe(gj.galore_adamw(1e-2, 4), jnp.zeros((40, 16))).rows[0]
    assert row.projected and row.state_bytes == HAND["down"]


def test_rows_are_values():
    tx = gj.galore_adamw(1e-2, 4, axes=AXES)
    assert gj.describe(tx, PARAMS) == gj.describe(tx, PARAMS)
    assert hash(gj.describe(tx, PARAMS)) == hash(gj.describe(tx, PARAMS))
    assert isinstance(rows(tx)["down"].state_bytes, int | np.integer)
