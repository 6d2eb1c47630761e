"""What a run writes down and draws of its subspaces."""

import json
import shutil

import jax
import numpy as np
import pytest
from matplotlib.image import imread
from tiny_run import GALORE, rows, run

from examples.llama import config, progress, report, subspace, train

KINDS = [*subspace.KINDS]
LOOKS = GALORE | {"backward": "full", "diagnostics-every": 2, "refresh": "every", "gap": 3}


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("reference")
    assert run(corpus, run_dir, **LOOKS) == train.FINISHED
    return run_dir


def readings(run_dir):
    return {row["step"]: row["subspace"] for row in rows(run_dir) if "subspace" in row}


def test_every_look_is_in_the_log(reference):
    seen = readings(reference)
    assert list(seen) == [2, 4, 6, 8]
    for step, reading in seen.items():
        assert len(reading) == len(KINDS)
        for own in reading.values():
            assert own["refreshes"] == [-(-step // 3)] * 2 and own["gap"] == [3, 3]
            # An overlap needs two refreshes: the second is that of step 4, at count 3.
            assert (own["overlap"] == [None, None]) == (step == 2)
            assert all(0 < x <= 1 for x in own["captured"])
            assert step == 2 or all(0 < x <= 1 for x in own["overlap"])
    assert (reference / "subspace.png").read_bytes().startswith(b"\x89PNG")


def test_a_fresh_subspace_captures_more(reference):
    """Step 4 refreshes, step 6 projects onto what is two steps old."""
    means = [
        np.mean([own["captured"] for own in reading.values()])
        for reading in readings(reference).values()
    ]
    assert means[1] > means[2]


def test_resuming_goes_on_with_the_history(reference, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(reference, resumed)
    shutil.rmtree(resumed / "checkpoints" / "00000008")
    (resumed / "subspace.png").unlink()
    assert train.main(["--run-dir", str(resumed), "--resume"]) == train.FINISHED
    assert rows(resumed) == rows(reference)
    np.testing.assert_array_equal(
        imread(resumed / "subspace.png"), imread(reference / "subspace.png")
    )


def test_layers_and_projected_gradients_tell_the_same_but_for_energy(corpus, reference, tmp_path):
    full = readings(reference)
    flags = LOOKS | {"backward": "projected"}
    assert run(corpus, tmp_path / "layers", "--layerwise", **flags) == train.FINISHED
    for step, reading in readings(tmp_path / "layers").items():
        for path, own in reading.items():
            assert "captured" not in own
            assert own["refreshes"] == full[step][path]["refreshes"]
            if step > 2:
                np.testing.assert_allclose(own["overlap"], full[step][path]["overlap"], atol=1e-2)


def test_on_a_mesh(corpus, reference, tmp_path):
    assert len(jax.devices()) == 8
    options = LOOKS | {"mesh": "data=2,fsdp=2,tensor=2"}
    assert run(corpus, tmp_path / "mesh", **options) == train.FINISHED
    for path, own in readings(tmp_path / "mesh")[2].items():
        np.testing.assert_allclose(
            own["captured"], readings(reference)[2][path]["captured"], atol=1e-3
        )


@pytest.mark.parametrize(
    "options", [GALORE | {"diagnostics-every": 0}, {"optimizer": "adamw"}], ids=["off", "no lens"]
)
@pytest.mark.sampled(1)
def test_nothing_is_written_and_drawn_where_nothing_is_looked_at(options, corpus, tmp_path):
    assert run(corpus, tmp_path / "run", steps=2, **options) == train.FINISHED
    assert readings(tmp_path / "run") == {}
    assert not (tmp_path / "run" / "subspace.png").exists()


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="--diagnostics-every -1"):
        config.resolve(config.parse(["--diagnostics-every", "-1"]))


def test_the_default_is_a_hundred_looks_at_most_a_hundred_steps_apart():
    def every(steps):
        return config.resolve(config.parse(["--steps", str(steps)])).run.diagnostics_every

    assert [every(steps) for steps in (8, 500, 10_000, 60_000)] == [1, 5, 100, 100]


# The log and the picture, without a run


def row(step, gap, overlap):
    own = {"refreshes": [step, step], "gap": gap, "overlap": overlap}
    return {"step": step, "subspace": {f"blocks/x/{kind}/kernel": own for kind in ("up", "q")}}


def test_history_is_layers_by_steps_in_the_order_of_the_model():
    log = [row(1, [2, 2], [None, None]), {"step": 2, "loss": 1.0}, row(3, [2, 4], [0.5, 0.25])]
    steps, seen = subspace.history(log)
    np.testing.assert_array_equal(steps, [1, 3])
    assert list(seen["overlap"]) == ["q", "up"] and seen["captured"] == {}
    np.testing.assert_array_equal(seen["overlap"]["q"], [[np.nan, 0.5], [np.nan, 0.25]])
    np.testing.assert_array_equal(seen["gap"]["up"], [[2, 2], [2, 4]])


@pytest.mark.parametrize(
    "log", [[], [{"step": 1, "loss": 2.0}], [row(1, [5, 5], [None, None])]], ids=len
)
def test_no_picture_of_nothing(log, tmp_path):
    assert not subspace.plot(tmp_path / "subspace.png", log, title="")
    assert not (tmp_path / "subspace.png").exists()


def test_gaps_are_drawn_where_they_differ(tmp_path):
    def height(log):
        assert subspace.plot(tmp_path / "subspace.png", log, title="")
        return imread(tmp_path / "subspace.png").shape[0]

    alike = [row(1, [2, 2], [0.1, 0.2]), row(3, [2, 2], [0.5, 0.25])]
    grown = [row(1, [2, 2], [0.1, 0.2]), row(3, [2, 4], [0.5, 0.25])]
    assert height(grown) > height(alike)


def test_the_log_has_lists_and_tensorboard_their_means(tmp_path):
    written = row(1, [2, 4], [None, 0.5])
    assert dict(progress._scalars(written)) == {
        f"subspace/blocks/x/{kind}/kernel/{name}": value
        for kind in ("up", "q")
        for name, value in {"refreshes": 1.0, "gap": 3.0, "overlap": 0.5}.items()
    }
    log = progress.MetricsLog(tmp_path, last_step=0, warn=pytest.fail)
    log.write([{"step": 1, "group": {"list": [float("nan"), 1.0]}}])
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "group": {"list": [None, 1.0]}}


def test_a_run_that_is_interrupted_leaves_its_pictures(reference, tmp_path):
    """What `pause` draws needs nothing but the log."""
    settings = config.resolve(config.load(reference / "config.json"))
    shutil.copy(reference / "metrics.jsonl", tmp_path)
    here = config.dataclasses.replace(
        settings, run=config.dataclasses.replace(settings.run, run_dir=tmp_path)
    )
    report.draw(here, unigram_nats=4.0)
    assert (tmp_path / "loss.png").exists() and (tmp_path / "subspace.png").exists()
