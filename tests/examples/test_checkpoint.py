"""Checkpoints of the Llama example: exact, refused by name, robust against crash and damage."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama import checkpoint
from examples.llama.checkpoint import CheckpointError, Checkpoints

IDENTITY = {"rank": 4, "corpus fingerprint": "abc"}


def make_state(seed: int = 0, *, size: int = 8):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "params": {"w": jax.random.normal(keys[0], (4, size)), "half": jnp.ones(3, jnp.bfloat16)},
        "opt": ((), None, {"count": jnp.int32(seed), "empty": jnp.zeros((0, 0))}),
        "codes": jax.random.randint(keys[1], (5,), 0, 255).astype(jnp.uint8),
    }


def template(state=None):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state or make_state()
    )


@pytest.fixture
def warnings_heard():
    return []


@pytest.fixture
def checkpoints(tmp_path, warnings_heard):
    made = Checkpoints(tmp_path, keep=2, warn=warnings_heard.append)
    yield made
    made.close()


def save(checkpoints, step, **record):
    checkpoints.save(step, make_state(step), {"identity": IDENTITY, **record})


def assert_same(state, wanted):
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_what_is_saved_comes_back_exactly(checkpoints):
    save(checkpoints, 3, progress={"data": {"next": 7}})
    state, record = checkpoints.restore(template(), IDENTITY)
    assert_same(state, make_state(3))
    assert (record["step"], record["progress"]) == (3, {"data": {"next": 7}})


def test_the_buffers_may_be_donated_while_a_save_is_under_way(checkpoints):
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree), donate_argnums=0)
    state = make_state(1, size=200_000)
    wanted = jax.tree.map(np.array, state)
    checkpoints.save(1, state, {"identity": IDENTITY})
    for _ in range(3):
        state = double(state)
    jax.block_until_ready(state)
    restored, _ = checkpoints.restore(template(state), IDENTITY)
    assert_same(restored, wanted)


def test_only_the_newest_are_kept(checkpoints):
    for step in (1, 2, 3, 4):
        save(checkpoints, step)
    assert checkpoints.wait()
    assert checkpoints.steps() == [3, 4]
    assert len(os.listdir(checkpoints.directory)) == 2


def test_nothing_to_restore_is_none(checkpoints):
    assert checkpoints.restore(template(), IDENTITY) is None


def test_leftovers_of_a_crash_are_swept_and_never_read(tmp_path):
    (tmp_path / "00000007.partial" / "arrays").mkdir(parents=True)
    (tmp_path / "00000006.partial-deleted").mkdir()
    (tmp_path / "00000008.partial.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.restore(template(), IDENTITY) is None
    assert os.listdir(tmp_path) == []
    checkpoints.close()


@pytest.mark.parametrize(
    ("field", "value"), [("rank", 8), ("corpus fingerprint", "xyz"), ("new field", 1)]
)
def test_another_run_is_refused_by_field_and_both_values(checkpoints, field, value):
    save(checkpoints, 1)
    checkpoints.wait()
    wanted = rf"{field}: .*saved with {IDENTITY.get(field)!r}, this run has {value!r}.*--run-dir"
    with pytest.raises(CheckpointError, match=wanted):
        checkpoints.restore(template(), IDENTITY | {field: value})
    assert checkpoints.steps() == [1]


def test_another_layout_is_refused_by_leaf_and_both_shapes(checkpoints):
    save(checkpoints, 1)
    checkpoints.wait()
    other = make_state(size=9)
    del other["codes"]
    with pytest.raises(CheckpointError, match=r"codes: .*uint8\[5\].*no such leaf"):
        checkpoints.restore(template(other), IDENTITY)
    with pytest.raises(CheckpointError, match=r"params/w: .*float32\[4,8\].*float32\[4,9\]"):
        checkpoints.restore(template(make_state(size=9)), IDENTITY)


@pytest.mark.parametrize(
    ("saved", "age"), [(None, "an older"), (1, "an older"), (checkpoint.FORMAT + 1, "a newer")]
)
def test_a_checkpoint_of_another_version_is_refused_with_the_way_out(checkpoints, saved, age):
    """Whatever else differs: its identity and its leaves are not compared at all."""
    save(checkpoints, 1)
    checkpoints.wait()
    folder = checkpoints.directory / "00000001"
    record = json.loads((folder / "run.json").read_text())
    assert record.pop("format") == checkpoint.FORMAT
    given = {} if saved is None else {"format": saved}
    (folder / "run.json").write_text(json.dumps(record | given))
    digests = json.loads((folder / "sha256.json").read_text())
    digests["run.json"] = hashlib.sha256((folder / "run.json").read_bytes()).hexdigest()
    (folder / "sha256.json").write_text(json.dumps(digests))
    message = rf"{age} version of galore_jax.*format {saved or 1};.*with that version.*--run-dir"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.restore(template(make_state(size=9)), IDENTITY | {"rank": 8})
    assert checkpoints.steps() == [1]


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, os.remove])
@pytest.mark.parametrize("victim", ["largest", "run.json", "sha256.json"])
def test_a_damaged_checkpoint_is_set_aside_for_an_older_one(
    checkpoints, warnings_heard, harm, victim
):
    save(checkpoints, 1)
    save(checkpoints, 2)
    checkpoints.wait()
    newest = checkpoints.directory / "00000002"
    files = [path for path in newest.rglob("*") if path.is_file()]
    largest = max((f for f in files if "arrays" in f.parts), key=lambda f: f.stat().st_size)
    harm(largest if victim == "largest" else newest / victim)
    state, record = checkpoints.restore(template(), IDENTITY)
    assert record["step"] == 1
    assert_same(state, make_state(1))
    assert len(warnings_heard) == 1
    assert "step 2 is damaged" in warnings_heard[0]
    assert str(checkpoints.directory / "00000002.damaged") in warnings_heard[0]
    save(checkpoints, 2)
    assert checkpoints.wait() and checkpoints.steps() == [1, 2]


def test_without_any_intact_checkpoint_it_never_starts_from_scratch(checkpoints):
    save(checkpoints, 1)
    checkpoints.wait()
    os.remove(checkpoints.directory / "00000001" / "run.json")
    for _ in range(2):  # also when it is called again
        with pytest.raises(CheckpointError, match=re.escape(str(checkpoints.directory))):
            checkpoints.restore(template(), IDENTITY)


def test_a_failed_save_costs_only_itself(checkpoints, warnings_heard, monkeypatch):
    save(checkpoints, 1)
    checkpoints.wait()
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(checkpoint, "_digest", full)
        save(checkpoints, 2)
        assert not checkpoints.wait()
    assert len(warnings_heard) == 1
    for part in (
        "step 2 could not be saved",
        "No space left",
        "step 1",
        str(checkpoints.directory),
    ):
        assert part in warnings_heard[0]
    assert os.listdir(checkpoints.directory) == ["00000001"]
    save(checkpoints, 3)
    assert checkpoints.wait() and checkpoints.steps() == [1, 3]


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint of a megabyte, not for two."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs the right to mount a tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)])
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk, warnings_heard):
    big = make_state(1, size=75_000)  # 1.2 MB of noise, which does not compress
    checkpoints = Checkpoints(small_disk, keep=1, warn=warnings_heard.append)
    checkpoints.save(1, big, {"identity": IDENTITY})
    assert checkpoints.wait(), warnings_heard
    checkpoints.save(2, big, {"identity": IDENTITY})
    assert not checkpoints.wait()
    assert "step 2 could not be saved" in warnings_heard[0]
    assert os.listdir(small_disk) == ["00000001"]
    state, record = checkpoints.restore(template(big), IDENTITY)
    assert record["step"] == 1
    assert_same(state, big)
    checkpoints.close()
