"""The example with Q-GaLore and INT8 weights, run as a user runs it."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import tiny_run
from tiny_run import arrays, rows, run

from examples.llama import train

# Wide enough that the moments of the embedding and of the MLPs reach 4096 entries.
WIDE = {"hidden-size": 64, "intermediate-size": 256}
Q_GALORE = WIDE | {"optimizer": "q_galore_adamw8bit", "weights": "int8", "rank": 8, "gap": 2}


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """A run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("reference")
    assert run(corpus, run_dir, **Q_GALORE) == train.FINISHED
    return run_dir


def interrupted(reference, directory):
    """A copy of the reference as a crash after its first checkpoint would have left it."""
    shutil.copytree(reference, directory)
    shutil.rmtree(directory / "checkpoints" / "00000008")
    (directory / "summary.json").unlink()
    return directory


def refused(run_dir, flags, capsys):
    """What a run says that does not start."""
    assert train.main(["--run-dir", str(run_dir), *flags.split()]) == train.FAILED
    error = capsys.readouterr().out
    assert "ERROR" in error
    return " ".join(error.split())


def test_it_finishes_and_says_what_it_did(reference):
    written = rows(reference)
    losses = [row["loss"] for row in written if "loss" in row]
    assert len(losses) == 8 and all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["valid_loss"] < losses[0]
    assert "codec=int4" in summary["optimizer"] and "refresh=adaptive" in summary["optimizer"]
    # Seven kernels in each of two layers, refreshed at most at steps 0, 2, 4, 6.
    assert summary["refreshes"]["bases"] == 14
    assert 14 <= summary["refreshes"]["done"] <= 4 * 14
    state, adamw = (summary[name]["total"] for name in ("state_bytes", "adamw_state_bytes"))
    assert 0 < state < 0.35 * adamw


def test_what_lies_in_a_checkpoint(reference):
    """Codes of weights, of bases and of moments; the rest at full precision."""
    saved = arrays(reference, 8)

    def found(pattern):
        return {name: leaf for name, leaf in saved.items() if re.search(pattern, name)}

    for part, dtype in (("codes", "uint8"), ("scales", "float32"), ("zeros", "uint8")):
        weights = found(rf"params/blocks/.*/kernel/{part}")
        assert len(weights) == 7 and {leaf.dtype.name for leaf in weights.values()} == {dtype}
    assert all(
        leaf.dtype == np.float32 for leaf in found(r"params/(embed|norm|head|lm_head)").values()
    )
    bases = found(r"projectors/blocks/.*/codes")
    assert len(bases) == 7 and all(leaf.shape[-2:] == (32, 8) for leaf in bases.values())
    for moment in ("mu", "nu"):
        codes = found(rf"inner_state/.*{moment}/.*codes")
        assert codes and {leaf.dtype for leaf in codes.values()} == {np.dtype(np.uint8)}
        assert any("embed" in name for name in codes)
        assert any("blocks" in name for name in codes)


def test_every_leaf_of_the_model_moves(reference):
    """The scale of a norm and the embedding like everything else."""
    before, after = (arrays(reference, step) for step in (4, 8))
    leaves = [n for n in after if "params/" in n and not re.search("opt_state|scales|zeros", n)]
    assert len(leaves) >= 10
    for name in leaves:
        assert np.mean(before[name] != after[name]) > 0.1, name


def test_resuming_is_bit_exact(reference, tmp_path):
    resumed = interrupted(reference, tmp_path / "resumed")
    assert train.main(["--run-dir", str(resumed), "--resume"]) == train.FINISHED
    assert rows(resumed) == rows(reference)
    wanted = arrays(reference, 8)
    assert any(leaf.dtype == np.uint8 for leaf in wanted.values())
    for name, leaf in arrays(resumed, 8).items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)


@pytest.mark.parametrize(
    ("flag", "value", "saved"),
    [
        ("weights", "full", "int8"),
        ("codec", "int8", "int4"),
        ("codec", "identity", "int4"),
        ("optimizer", "galore_adamw8bit", "q_galore_adamw8bit"),
    ],
)
def test_another_storage_is_refused_by_name(flag, value, saved, reference, tmp_path, capsys):
    resumed = interrupted(reference, tmp_path / "resumed")
    error = refused(resumed, f"--resume --{flag} {value}", capsys)
    assert re.search(rf"ERROR: {flag}: .*saved with '{saved}', this run has '{value}'", error)
    assert rows(resumed) == rows(reference), "a refused run must leave no trace"


def test_threshold_gap_and_rounding_may_change_on_resume(reference, tmp_path):
    resumed = interrupted(reference, tmp_path / "resumed")
    flags = ["--threshold", "0.9", "--gap", "3", "--rounding", "nearest"]
    assert train.main(["--run-dir", str(resumed), "--resume", *flags]) == train.FINISHED
    assert rows(resumed)[:5] == rows(reference)[:5]
    assert rows(resumed)[-1]["step"] == 8


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        ("--optimizer q_galore_adamw8bit --refresh every --threshold 0.5", "--threshold"),
        ("--optimizer galore_adamw --threshold 0.5", "--threshold"),
        ("--optimizer galore_adamw8bit --refresh staggered --threshold 0.5", "--threshold"),
        ("--optimizer adamw --codec int4", "--codec"),
        ("--optimizer adamw8bit --codec int8", "--codec"),
        ("--optimizer adamw8bit --rank 4", "--rank"),
        ("--optimizer adafactor --refresh adaptive", "--refresh"),
        ("--optimizer q_galore_adamw8bit --matrix-lr-scale 0.25", "--matrix-lr-scale"),
    ],
)
def test_options_without_effect_are_refused(flags, idle, tmp_path, capsys):
    error = refused(tmp_path / "run", flags, capsys)
    assert f"{idle}: no effect" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--threshold 1.5", "threshold"),
        ("--threshold 0", "threshold"),
        ("--gap 0", "gap"),
    ],
)
def test_bad_numbers_are_refused(flags, reason, corpus, tmp_path, capsys):
    line = tiny_run.arguments(corpus, tmp_path / "run", **{**Q_GALORE, **dict([_pair(flags)])})
    assert train.main(line) == train.FAILED
    assert reason in capsys.readouterr().out


def _pair(flags):
    name, value = flags.removeprefix("--").split()
    return name, value


VARIANTS = {
    "adamw8bit": {"optimizer": "adamw8bit"},
    "q_galore, bf16, accumulation, rotate": Q_GALORE
    | {"param-dtype": "bfloat16", "accumulation": 2, "transport": "rotate", "codec": "int8"},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.sampled(1)
def test_other_combinations_run(name, corpus, tmp_path):
    options = WIDE | VARIANTS[name] | {"steps": 3, "eval-every": 3, "save-every": 3}
    assert run(corpus, tmp_path / "run", **options) == train.FINISHED
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0]
    dtypes = {leaf.dtype.name for leaf in arrays(tmp_path / "run", 3).values()}
    assert "uint8" in dtypes
