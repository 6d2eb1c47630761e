"""The trainer on meshes of eight simulated devices: the same run, and every array in its place."""

import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_run import GALORE, arrays, rows, run

from examples.llama import config, feed, mesh, model, optimizers, task, train
from examples.llama.optimizers import path_name

BATCH = {"batch-size": 8}
MESHES = ["data=8", "fsdp=8", "data=4,tensor=2", "tensor=2,fsdp=2,data=2"]
THREE_AXES = "data=2,fsdp=2,tensor=2"
# Wide enough that moments are stored in 8 bits, and that blocks of codes are cut by the mesh.
WIDE = {"hidden-size": 64, "intermediate-size": 256}
# galore_adamw has tests of its own.
OPTIMIZERS = {
    "galore_adafactor": {"rank": 4, "param-dtype": "bfloat16", "weight-decay": 0.1},
    "q_galore_adamw8bit": {"rank": 8, "weights": "int8"} | WIDE,
    "adamw": {"accumulation": 2},
    "optax_galore": {"rank": 4},
}
MORE_OPTIMIZERS = {
    "galore_lion": {"rank": 4, "projector": "gram_eigh"},
    "galore_sgd": {"rank": 4, "transport": "rotate", "learning-rate": 0.1},
    "galore_adamw8bit": {"rank": 4} | WIDE,
    "adamw8bit": WIDE,
    "adafactor": {},
}


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """A run on one device."""
    run_dir = tmp_path_factory.mktemp("reference")
    assert run(corpus, run_dir, **GALORE, **BATCH) == train.FINISHED
    return run_dir


def losses(run_dir):
    return np.array([row.get("loss", row.get("valid_loss")) for row in rows(run_dir)])


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.sampled(1)
def test_a_run_on_a_mesh_is_the_run_on_one_device(axes, corpus, reference, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert run(corpus, run_dir, mesh=axes, **GALORE, **BATCH) == train.FINISHED
    assert len(losses(run_dir)) == 10
    np.testing.assert_allclose(losses(run_dir), losses(reference), rtol=1e-5)
    sizes = ", ".join(axes.split(","))
    assert re.search(
        rf"devices +8 x \w+, {sizes}; [\d.]+ kB of training state", capsys.readouterr().out
    )


def settings_of(corpus, **options):
    line = tiny_run.arguments(corpus, "unused", **(BATCH | options))
    return config.resolve(config.parse(line))


def train_steps(made, state, count):
    """A few steps without the rest of a run; the state and the losses."""
    train_step = made.train_step(jax.random.key(1))
    batches, found = made.training(None), []
    for _ in range(count):
        state, metrics = train_step(state, next(batches))
        found.append(float(metrics.loss))
    batches.close()
    return state, np.array(found)


@pytest.mark.parametrize(
    "name", [*OPTIMIZERS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_OPTIMIZERS)]
)
@pytest.mark.sampled(1)
def test_every_optimizer_does_the_same_on_a_mesh(name, corpus):
    own = (OPTIMIZERS | MORE_OPTIMIZERS)[name]
    options = {"optimizer": name, "warmup": 0} | ({"gap": 2} if "rank" in own else {}) | own
    found = []
    for axes in ({}, {"mesh": THREE_AXES}):
        made = task.make_task(settings_of(corpus, **options, **axes))
        state, seen = train_steps(made, made.new_state(), 4)
        assert_in_place(state, made)
        found.append(seen)
    assert found[0][-1] < found[0][0]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def assert_in_place(state, made):
    """Every array lies where the template says, and its shards are no larger than that."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for (path, x), wanted in zip(leaves, jax.tree.leaves(made.template), strict=True):
        name = path_name(path)
        assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim), name
        shape = wanted.sharding.shard_shape(x.shape)
        assert {shard.data.shape for shard in x.addressable_shards} == {shape}, name


def test_arrays_are_sharded_as_promised(corpus):
    """By hand: shards of a model with D = 16, F = 32, V = 64, L = 2 and rank 4."""
    made = task.make_task(settings_of(corpus, mesh=THREE_AXES, **GALORE))
    state, _ = train_steps(made, made.new_state(), 2)
    shards = {
        path_name(path): x.addressable_shards[0].data.shape
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }
    inner = "opt_state/inner_state/1/0"
    promised = {
        "params/embed/embedding": (32, 8),
        "params/lm_head/kernel": (8, 32),
        "params/norm/scale": (16,),
        "params/blocks/attn_norm/scale": (2, 16),
        "params/blocks/attn/q/kernel": (2, 8, 8),
        "params/blocks/attn/o/kernel": (2, 8, 8),
        "params/blocks/mlp/up/kernel": (2, 8, 16),
        "params/blocks/mlp/down/kernel": (2, 16, 8),
        # Input projected: bases along it, moments along the output.
        f"{inner}/projectors/blocks/attn/q/kernel": (2, 8, 4),
        f"{inner}/inner_state/mu/blocks/attn/q/kernel": (2, 8, 4),
        f"{inner}/projectors/blocks/mlp/up/kernel": (2, 8, 4),
        f"{inner}/inner_state/nu/blocks/mlp/up/kernel": (2, 16, 4),
        f"{inner}/inner_state/mu/embed/embedding": (32, 8),
    }
    assert {name: shards.get(name) for name in promised} == promised


def test_a_device_holds_its_part_of_the_bytes(corpus):
    """Of AdamW's three copies of the model a quarter, but for the norms and scalars."""
    options = WIDE | {"optimizer": "adamw"}
    alone = task.make_task(settings_of(corpus, **options)).template
    made = task.make_task(settings_of(corpus, **options, mesh=THREE_AXES))
    on_devices = dict.fromkeys(jax.devices(), 0)
    for x in jax.tree.leaves(made.new_state()):
        for shard in x.addressable_shards:
            on_devices[shard.device] += shard.data.nbytes
    norms = 3 * 4 * 64 * (2 + 2 + 1)
    scalars = [x for x in jax.tree.leaves(alone) if x.ndim == 0]
    assert 0 < len(scalars) < 10
    copied = norms + sum(x.dtype.itemsize for x in scalars)
    wanted = (mesh.bytes_per_device(alone) - copied) // 4 + copied
    assert set(on_devices.values()) == {wanted} == {mesh.bytes_per_device(made.template)}


def test_columns_and_rows_of_a_product_are_split_as_megatron_does():
    devices = mesh.make_mesh("fsdp=4,tensor=2")
    for name, entries in {
        "blocks/attn/v/kernel": (None, "fsdp", "tensor"),
        "blocks/mlp/down/kernel": (None, "tensor", "fsdp"),
        "blocks/mlp_norm/scale": (),
    }.items():
        assert tuple(mesh.param_spec(devices, name)) == entries
    assert tuple(mesh.param_spec(mesh.make_mesh("data=8"), "lm_head/kernel")) == (None, None)
    tensor = mesh.param_spec(mesh.make_mesh("tensor=8"), "blocks/attn/o/kernel")
    assert tuple(tensor) == (None, "tensor", None)


def test_rows_stay_rows_and_weights_are_gathered(corpus):
    """Fully sharded: no device computes with all rows of a batch, none holds a stack of weights."""
    settings = settings_of(corpus, mesh="fsdp=8", **(GALORE | {"num-layers": 3, "seq-len": 24}))
    made = task.make_task(settings)
    train_step = made.train_step(None)
    tokens = jax.ShapeDtypeStruct((8, 24), jnp.int32, sharding=made.batch_sharding)
    batch = {"inputs": tokens, "targets": tokens}
    compiled = train_step.lower(made.template, batch).compile()
    program = compiled.as_text()
    assert re.search(r"f32\[1,24,32\]", program), "one row's features on each device"
    assert not re.search(r"f32\[8,24,(16|32|64)\]", program), "all rows' features"
    gathered = re.findall(r"= (\S+) all-gather\(", program)
    assert gathered and not any(shape.startswith(("f32[3,16,", "f32[3,32,")) for shape in gathered)


def test_a_step_that_is_not_finite_changes_nothing_on_any_device(corpus):
    made = task.make_task(settings_of(corpus, mesh=THREE_AXES, **GALORE))

    def loss_fn(params, batch):  # of one device's rows only
        bad = jnp.arange(8) == 5
        logits = model.apply(made.llama, params, batch["inputs"])
        nats = -jax.nn.log_softmax(logits)[:, 0, 0]
        return jnp.sum(jnp.where(bad, jnp.nan, nats))

    train_step = made._replace(loss_fn=loss_fn).train_step(None)
    before = jax.device_get(made.new_state().params)
    state, metrics = train_step(made.new_state(), next(made.training(None)))
    assert int(metrics.bad_in_a_row) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)


@pytest.mark.parametrize("axes", ["", THREE_AXES])
@pytest.mark.sampled(1)
def test_a_checkpoint_goes_on_anywhere(axes, corpus, reference, tmp_path):
    """Begun on one device (or eight), resumed on eight (or one)."""
    begun = reference
    if not axes:
        begun = tmp_path / "begun"
        assert run(corpus, begun, mesh=THREE_AXES, **GALORE, **BATCH) == train.FINISHED
    resumed = tmp_path / "resumed"
    shutil.copytree(begun, resumed)
    shutil.rmtree(resumed / "checkpoints" / "00000008")
    line = ["--run-dir", str(resumed), "--resume", *(["--mesh", axes] if axes else [])]
    assert train.main(line) == train.FINISHED
    assert len(losses(resumed)) == 10
    np.testing.assert_allclose(losses(resumed), losses(reference), rtol=1e-4)
    wanted, found = arrays(reference, 8), arrays(resumed, 8)
    assert wanted.keys() == found.keys()
    assert "mesh" not in (resumed / "config.json").read_text()


def refused(capsys, corpus, run_dir, **options):
    assert run(corpus, run_dir, **options) == train.FAILED
    assert not (run_dir / "checkpoints").exists()
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": "model=8"}, "no axis is called 'model'; give any of data, fsdp, tensor"),
        ({"mesh": "data"}, "data needs a size of at least 1"),
        ({"mesh": "data=0"}, "data needs a size of at least 1"),
        ({"mesh": "data=2,data=4"}, "data comes twice"),
        ({"mesh": "data=2,fsdp=2"}, "4 devices, but JAX finds 8"),
        ({"mesh": "data=8", "batch-size": 4}, "--batch-size 4: .* data=8, which does not divide"),
        (
            {"mesh": "data=2,fsdp=4", "batch-size": 16, "accumulation": 4},
            "--batch-size 16 / --accumulation 4: .* data=2 x fsdp=4",
        ),
        (
            {"mesh": "tensor=8", "intermediate-size": 36, "rank": 4},
            r"--mesh tensor=8: leaf 'blocks/mlp/(down|gate|up)/kernel' of shape .*36",
        ),
        ({"process-id": 0, "num-processes": 2}, "--num-processes, --process-id: no effect"),
        ({"cpu-devices": 0}, "--cpu-devices 0: must be at least 1"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(options, message, corpus, tmp_path, capsys):
    error = refused(capsys, corpus, tmp_path / "run", **(BATCH | options))
    assert re.search(message, error), error


class Part:
    """A sharding as one process sees it: the rows of its devices."""

    def __init__(self, *rows):
        self._rows = rows

    def addressable_devices_indices_map(self, shape):
        return {number: (rows,) for number, rows in enumerate(self._rows)}


@pytest.mark.parametrize(
    ("rows", "share"),
    [
        ([slice(None)], (0, 1)),
        ([slice(0, 4)], (0, 2)),
        ([slice(4, 6), slice(6, 8)], (1, 2)),
        ([slice(4, 6), slice(4, 6)], (2, 4)),
        ([slice(2, 4), slice(4, 6)], (0, 1)),  # two shares: read all
        ([slice(0, 2), slice(6, 8)], (0, 1)),  # far apart: read all
    ],
)
def test_a_process_reads_the_rows_of_its_devices(rows, share):
    assert feed.own_share(Part(*rows), 8) == share


def test_batches_arrive_whole():
    whole = np.arange(8 * 3).reshape(8, 3)
    grid = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "tensor"))
    for spec in (PartitionSpec("data"), PartitionSpec()):
        sharding = NamedSharding(grid, spec)
        assert feed.own_share(sharding, 8) == (0, 1)
        placed = feed.to_devices(sharding, 8, feed.Share(0, 1))({"x": whole})["x"]
        assert placed.sharding == sharding
        np.testing.assert_array_equal(placed, whole)


def test_all_optimizers_are_here():
    wanted = set(optimizers.OptimizerName.__args__)
    assert {"galore_adamw", *OPTIMIZERS, *MORE_OPTIMIZERS} == wanted
    assert math.prod(mesh.parse_axes(THREE_AXES).values()) == len(jax.devices())
