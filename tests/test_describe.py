"""The table of `describe`: rows, bytes, and transformations with lenses deep inside."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

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
# Adam keeps two fp32 arrays; a projected matrix adds its basis. A stack also has a flag, a count
# and an overlap for each of its matrices.
HAND = {
    "embed": 2 * 50 * 16 * FLOAT,
    "layers/up": 3 * (16 * 4 + 2 * 40 * 4) * FLOAT + 3 * (1 + 4 + 4),
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
    total = sum(x.nbytes for x in jax.tree.leaves(gj.galore_adamw(1e-2, 4, axes=AXES).init(PARAMS)))
    adamw = sum(x.nbytes for x in jax.tree.leaves(optax.adamw(1e-2).init(PARAMS)))
    assert lines[-1] == (
        f"2 of 2 matrices projected; state {total / 1e3:.1f} kB, AdamW {adamw / 1e3:.1f} kB "
        f"({100 * total / adamw:.0f} %)"
    )
    assert len({line.index("yes") for line in lines if " yes " in line}) == 1  # columns line up


def test_equal_layers_share_a_line():
    layer = {"up": jnp.zeros((16, 40)), "scale": jnp.zeros(16)}
    params = {"layers": [layer] * 12, "other": {"up": jnp.zeros((16, 24))}}
    seen = gj.describe(gj.galore_adamw(1e-2, 4), params)
    lines = [line.split() for line in str(seen).splitlines()[2:-1]]
    each = 16 * 4 * FLOAT + 2 * 40 * 4 * FLOAT
    assert [line[:3] for line in lines] == [
        ["layers/{0..11}/scale", "(x12)", "(16)"],
        ["layers/{0..11}/up", "(x12)", "(16,40)"],
        ["other/up", "(16,24)", "yes"],
    ]
    # Flags of the twelve lie in one array, a twelfth of which is each one's.
    assert {r.state_bytes for r in seen.rows if r.path.endswith("/up")} == {
        each + 9,
        16 * 4 * 4 * 4,
    }
    assert f"{12 * (each + 9) / 1e3:.1f}" in lines[1]


def test_abstract_parameters():
    tx = gj.galore_adamw(1e-2, 4, axes=AXES)
    huge = {"w": jax.ShapeDtypeStruct((80, 8192, 8192), jnp.bfloat16)}
    assert gj.describe(tx, huge).rows[0].state_bytes > 2**20
    assert gj.describe(tx, jax.eval_shape(lambda: PARAMS)) == gj.describe(tx, PARAMS)


def test_without_leaves():
    assert gj.describe(gj.galore_adamw(1e-2, 4), {}).rows == ()
    assert "0 of 0 matrices" in str(gj.describe(gj.galore_adamw(1e-2, 4), {}))


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


MESH = AbstractMesh((4, 2), ("data", "model"))
SHARDED = {"q": (16, 4, 8), "down": (40, 16), "up": (16, 40), "embed": (48, 16), "bias": (16,)}
SPECS = {
    "q": P("data", None, "model"),
    "down": P("data", "model"),
    "up": P("model"),
    "embed": P("data"),
    "bias": P(),
}
Q_AXES = {"q": gj.MatrixAxes(0, (1, 2))}


def shapes():
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHARDED.items()}


def on(mesh):
    return {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}


def sharded(tx, params=None, mesh=MESH, **options):
    seen = gj.describe(tx, shapes() if params is None else params, on(mesh), **options)
    return {row.path: row.sharding for row in seen.rows}


def test_specs_of_the_state():
    seen = sharded(gj.galore_adamw(1e-2, 4, axes=Q_AXES))
    assert seen["down"].spec == P("data", "model")
    assert (seen["down"].basis, seen["down"].moments) == (P("model", None), P("data", None))
    assert (seen["up"].basis, seen["up"].moments) == (P("model", None), P(None, None))
    assert (seen["embed"].basis, seen["embed"].moments) == (None, P("data", None))
    # Heads and their entries are one axis; only whole heads could be on different devices.
    assert (seen["q"].basis, seen["q"].moments) == (P("data", None), P(None, None))
    assert seen["bias"].spec == P(None) and seen["bias"].notes == ()


def test_notes_say_what_is_replicated_and_why():
    seen = sharded(gj.galore_adamw(1e-2, 4, axes=Q_AXES))
    assert seen["embed"].notes == ()
    (note,) = seen["up"].notes
    assert note == "mu, nu replicated over model, where the projected axis is (spread=True)"
    kept, projected = seen["down"].notes
    assert kept == "projectors replicated over data, where the kept axis is"
    assert projected == "mu, nu replicated over model, where the projected axis is (spread=True)"
    assert "axes (1, 2) form the kept axis" in seen["q"].notes[0]
    spread = sharded(gj.galore_adamw(1e-2, 4, axes=Q_AXES), spread=True)
    assert spread["up"].notes == () and spread["up"].moments == P("model", None)
    assert spread["up"].state_bytes < seen["up"].state_bytes


def test_notes_say_what_the_mesh_does_not_divide():
    """Blocks of 8 along 40 entries: five scales for four devices."""
    tx = gj.low_rank_projection(
        gj.quantized_state(optax.trace(0.9), block=8, min_size=1), 4, axes=Q_AXES
    )
    down = sharded(tx)["down"]
    assert down.moments == P("data", None)
    (note,) = (note for note in down.notes if "divide" in note)
    assert note == "trace.scales axis 0 is replicated over data: 4 shards do not divide 5"
    # Spread over two mesh axes, an axis that only the first of them divides keeps that one.
    wide = {"w": jax.ShapeDtypeStruct((16, 12), jnp.float32)}
    both = {"w": NamedSharding(MESH, P("data", "model"))}
    row = gj.describe(gj.galore_sgd(1e-2, 4, momentum=0.9), wide, both, spread=True).rows[0]
    assert row.sharding.moments == P(("data", "model"), None)
    row = gj.describe(
        gj.galore_sgd(1e-2, 4, momentum=0.9, side="input"), wide, both, spread=True
    ).rows[0]
    assert row.sharding.moments == P("model", None)  # 12 rows: not over model and data
    assert "trace axis 0 is replicated over data: 8 shards do not divide 12" in row.sharding.notes


@pytest.mark.standard_promotion
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(
    "tx",
    [
        gj.galore_adamw(1e-2, 4, axes=Q_AXES, side="long"),
        gj.galore_adafactor(1e-2, 4, axes=Q_AXES),
        gj.low_rank_projection(
            gj.quantized_state(optax.scale_by_adam(), block=8, min_size=1),
            4,
            axes=Q_AXES,
            codec=gj.codecs.int4(block=6),
        ),
        optax.MultiSteps(gj.galore_lion(1e-2, 4), 2).gradient_transformation(),
        optax.adamw(1e-2),
    ],
    ids=["long", "adafactor", "few bits", "multi", "no lens"],
)
def test_bytes_per_device_are_those_of_a_state_that_exists(tx, spread):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = {name: jnp.zeros(shape) for name, shape in SHARDED.items()}
    state = gj.init_sharded(tx, params, on(mesh), spread=spread)
    held = sum(
        array.addressable_shards[3].data.nbytes for array in jax.tree.leaves(state) if array.ndim
    )
    promised = sharded(tx, params, mesh, spread=spread)
    assert sum(row.state_bytes for row in promised.values()) == held < arrays(tx, params)


def test_the_table_with_shardings():
    tx = gj.galore_adamw(1e-2, 4, axes=Q_AXES)
    lines = str(gj.describe(tx, shapes(), on(MESH))).splitlines()
    assert lines[0].split()[:8] == [
        "path", "shape", "spec", "side", "rank", "basis", "moments", "per",
    ]  # fmt: skip
    down = next(line for line in lines if line.startswith("down"))
    assert "(data,model)" in down and "(model,-)" in down and "(data,-)" in down
    assert lines[7].startswith("3 of 3 matrices") and lines[7].endswith(" per device")
    footnotes = "\n".join(lines[8:])
    assert "down, q: projectors" not in footnotes  # q keeps nothing in pieces
    assert "up: mu, nu replicated over model" in footnotes
    assert max(map(len, lines)) < 120


def test_spreading_is_not_offered_where_it_would_not_help():
    params = {"w": jax.ShapeDtypeStruct((7, 6), jnp.float32)}
    tx = gj.galore_sgd(1e-2, 4, momentum=0.9)  # keeps 7 rows
    row = gj.describe(tx, params, {"w": NamedSharding(MESH, P(None, "model"))}).rows[0]
    (note,) = row.sharding.notes
    assert note.startswith("trace replicated over model") and "spread=True" not in note


def test_boxes_of_a_state_are_no_part_of_its_names():
    boxed = {"w": nn.Partitioned(jnp.zeros((16, 40)), ("model", None))}
    axis = NamedSharding(MESH, P(None, "data"))
    tx = gj.quantized_state(optax.trace(0.9), block=8, min_size=1)
    (row,) = gj.describe(optax.trace(0.9), boxed, {"w": axis}).rows
    assert row.sharding.moments == P(None, "data") and row.sharding.notes == ()
    (row,) = gj.describe(tx, boxed, {"w": axis}).rows
    assert row.sharding.notes[0].startswith("trace.scales axis 1")


def test_many_leaves_with_one_note_share_a_line():
    params = {f"layer{i}": jax.ShapeDtypeStruct((16, 40), jnp.float32) for i in range(5)}
    tx, rows = gj.galore_adamw(1e-2, 4), NamedSharding(MESH, P("data"))
    text = str(gj.describe(tx, params, dict.fromkeys(params, rows)))
    assert "layer0, layer1, layer2 and 2 more: mu, nu replicated over data" in text


def test_without_shardings_nothing_changes():
    tx = gj.galore_adamw(1e-2, 4, axes=Q_AXES)
    plain, placed = gj.describe(tx, shapes()), gj.describe(tx, shapes(), on(MESH))
    assert all(row.sharding is None for row in plain.rows)
    assert tuple(dataclasses.replace(row, sharding=None) for row in placed.rows) == plain.rows
    assert hash(placed) == hash(gj.describe(tx, shapes(), on(MESH))) and "spec" not in str(plain)
    assert gj.describe(tx, {}, {}).rows == ()


def test_shardings_that_do_not_fit():
    tx = gj.galore_adamw(1e-2, 4, axes=Q_AXES)
    with pytest.raises(ValueError, match="'down'"):
        gj.describe(tx, shapes(), on(MESH) | {"down": NamedSharding(MESH, P(None, None, "data"))})
