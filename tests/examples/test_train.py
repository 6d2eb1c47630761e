"""The trainer of the Llama example, run as a user runs it, on a corpus of 5,000 tokens."""

import json
import math
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from tiny_run import GALORE, arrays, rows, run

from examples.llama import (
    compare,
    config,
    gradients,
    model,
    objective,
    progress,
    report,
    step,
    train,
)

ADAMW = {"optimizer": "adamw", "matrix-lr-scale": 0.25}


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """A run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("reference")
    assert run(corpus, run_dir, **GALORE) == train.FINISHED
    return run_dir


@pytest.fixture(scope="module")
def adamw_reference(corpus, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("adamw")
    assert run(corpus, run_dir, **ADAMW) == train.FINISHED
    return run_dir


def interrupted(reference, directory):
    """A copy of the reference as a crash after its first checkpoint would have left it."""
    shutil.copytree(reference, directory)
    shutil.rmtree(directory / "checkpoints" / "00000008")
    (directory / "summary.json").unlink()
    return directory


def assert_same_run(run_dir, reference):
    assert rows(run_dir) == rows(reference)
    last = max(row["step"] for row in rows(reference))
    wanted = arrays(reference, last)
    for name, leaf in arrays(run_dir, last).items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)


def test_a_run_leaves_numbers_a_picture_and_a_summary(reference):
    written = rows(reference)
    assert [row["step"] for row in written if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in written if "valid_loss" in row] == [4, 8]
    assert all(math.isfinite(row["loss"]) for row in written if "loss" in row)
    assert written[-1]["tokens"] == 8 * 4 * 16
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["valid_loss"] == written[-1]["valid_loss"]
    assert summary["valid_perplexity"] == pytest.approx(math.exp(summary["valid_loss"]))
    assert (reference / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((reference / "tensorboard").iterdir())


def test_the_learning_rate_in_the_log_is_the_schedule(reference):
    logged = [row["learning_rate"] for row in rows(reference) if "loss" in row]
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 1, 8, 3e-4)
    np.testing.assert_allclose(logged, [schedule(i) for i in range(8)], rtol=1e-6)


@pytest.mark.parametrize("which", ["reference", "adamw_reference"])
@pytest.mark.sampled(1)
def test_resuming_is_bit_exact(which, request, tmp_path):
    whole = request.getfixturevalue(which)
    resumed = interrupted(whole, tmp_path / "resumed")
    assert len(rows(resumed)) == 10  # the ones past the checkpoint must go, and come again
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # cut short by the crash
    assert train.main(["--run-dir", str(resumed), "--resume"]) == train.FINISHED
    assert_same_run(resumed, whole)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("rank", {"rank": 2}),
        ("side", {"side": "long"}),
        ("optimizer", {"optimizer": "galore_lion"}),
        ("num_layers", {"num_layers": 1}),
        ("hidden_size", {"hidden_size": 32}),
        ("param_dtype", {"param_dtype": "bfloat16"}),
        ("seq_len", {"seq_len": 8}),
        ("refresh", {"refresh": "every"}),
        ("seed", {"seed": 1}),
    ],
)
def test_a_change_of_what_a_checkpoint_holds_is_refused_by_name(
    field, change, reference, tmp_path, capsys
):
    resumed = interrupted(reference, tmp_path / "resumed")
    flags = [x for k, v in change.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    assert train.main(["--run-dir", str(resumed), "--resume", *flags]) == train.FAILED
    error = capsys.readouterr().out.replace("\n", " ")
    old = tiny_run.saved_identity(reference, 4)[field]
    new = next(iter(change.values()))
    assert re.search(rf"ERROR: {field}: .*saved with {old!r}, +this run has {new!r}", error)
    assert rows(resumed) == rows(reference), "a refused run must leave no trace"


def test_another_corpus_is_refused(reference, tmp_path, capsys):
    resumed = interrupted(reference, tmp_path / "resumed")
    tokens = np.load(tiny_run.write_corpus(tmp_path) / "train.npy")
    np.save(tmp_path / "train.npy", tokens[::-1])
    paths = [str(tmp_path / "train.npy"), str(tmp_path / "valid.npy")]
    flags = ["--run-dir", str(resumed), "--resume", "--paths", *paths]
    assert train.main(flags) == train.FAILED
    assert "corpus fingerprint" in capsys.readouterr().out


def test_a_change_of_the_recipe_is_taken_on(reference, tmp_path):
    resumed = interrupted(reference, tmp_path / "resumed")
    flags = "--gap 2 --scale 0.5 --transport keep --projector svd --learning-rate 1e-3 --clip 0.5"
    more = "--steps 10 --batch-size 8 --weight-decay 0.1"
    line = ["--run-dir", str(resumed), "--resume", *flags.split(), *more.split()]
    assert train.main(line) == train.FINISHED
    before, after = rows(reference), rows(resumed)
    assert after[:5] == before[:5]
    assert [row["step"] for row in after if "loss" in row] == list(range(1, 11))
    assert after[-1]["tokens"] == 4 * 4 * 16 + 6 * 8 * 16
    saved = config.load(resumed / "config.json")
    assert (saved.optimizer.gap, saved.optimizer.rank, saved.schedule.steps) == (2, 4, 10)


def test_a_directory_in_use_needs_resume(reference, corpus, capsys):
    assert run(corpus, reference, **GALORE) == train.FAILED
    assert "--resume" in capsys.readouterr().out


def test_resuming_nothing_says_that_it_starts_from_scratch(corpus, tmp_path, capsys):
    assert run(corpus, tmp_path / "new", "--resume", steps=1, **ADAMW) == train.FINISHED
    assert "WARNING: no checkpoint" in capsys.readouterr().out


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(reference, tmp_path, capsys):
    resumed = tmp_path / "resumed"
    shutil.copytree(reference, resumed)
    os.remove(resumed / "checkpoints" / "00000008" / "run.json")
    assert train.main(["--run-dir", str(resumed), "--resume"]) == train.FINISHED
    assert "step 8 is damaged" in capsys.readouterr().out
    assert_same_run(resumed, reference)


def test_a_finished_run_can_be_resumed_to_its_report(reference, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(reference, resumed)
    (resumed / "summary.json").unlink()
    assert train.main(["--run-dir", str(resumed), "--resume"]) == train.FINISHED
    assert_same_run(resumed, reference)
    assert (resumed / "summary.json").exists()


def test_training_goes_on_when_no_checkpoint_can_be_written(corpus, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("examples.llama.checkpoint._digest", full)
    # Trained to the end, but the last state is lost: that is no success.
    assert run(corpus, tmp_path / "run", **ADAMW) == train.FAILED
    out = capsys.readouterr().out
    assert "step 4 could not be saved" in out and "step 8 could not be saved" in out
    assert (tmp_path / "run" / "summary.json").exists()


def test_non_finite_steps_are_skipped_counted_and_given_up_on(
    corpus, tmp_path, monkeypatch, capsys
):
    finite_loss = objective.loss

    def loss(llama, params, batch):
        # The first four batches are good; then the embedding has moved and every loss is NaN.
        bad = jnp.abs(params["embed"]["embedding"]).max() > LIMIT
        return finite_loss(llama, params, batch) + jnp.where(bad, jnp.nan, 0.0)

    monkeypatch.setattr(objective, "loss", loss)
    options = ADAMW | {"save-every": 1, "learning-rate": 1.0, "warmup": 2, "max-bad-steps": 3}
    run_dir = tmp_path / "run"
    assert run(corpus, run_dir, **options) == train.GAVE_UP
    bad = [row["bad_in_a_row"] for row in rows(run_dir) if "loss" in row]
    first = bad.index(1)
    assert bad[first:] == [1, 2, 3] and set(bad[:first]) == {0}
    assert all(row["loss"] is None for row in rows(run_dir)[first:] if "loss" in row)
    out = capsys.readouterr().out.replace("\n", " ")
    assert "3 steps in a row" in out and str(run_dir) in out.replace(" ", "")
    newest = max(int(path.name) for path in (run_dir / "checkpoints").iterdir())
    # Whatever is saved is finite, and is the state before the first bad step.
    for name, leaf in arrays(run_dir, newest).items():
        assert np.isfinite(leaf.astype(np.float32)).all(), name


LIMIT = 0.5


def tiny_llama():
    return model.LlamaConfig(
        vocab_size=tiny_run.VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        max_seq_len=16,
    )


def random_batch(seed, *, weights=None):
    tokens = np.random.default_rng(seed).integers(tiny_run.VOCAB, size=(4, 17)).astype(np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    return batch if weights is None else batch | {"weights": np.asarray(weights, np.float32)}


@pytest.mark.parametrize("weighted", [False, True])
def test_accumulation_equals_the_big_batch(weighted):
    params = {"table": jax.random.normal(jax.random.key(0), (tiny_run.VOCAB, tiny_run.VOCAB))}
    # Uneven: one micro-batch has nearly no tokens, one has none at all.
    weights = np.ones((4, 16))
    weights[1, 2:], weights[2] = 0, 0
    batch = random_batch(0, weights=weights if weighted else None)

    def loss_fn(params, batch):
        logits = params["table"][batch["inputs"]]
        return objective.cross_entropy(logits, batch["targets"], batch.get("weights"))

    def pass_over(micro_batches):
        return jax.jit(gradients.accumulated_value_and_grad, static_argnums=(0, 3))(
            loss_fn, params, batch, micro_batches
        )

    whole = pass_over(1)
    for micro_batches in (2, 4) if weighted else (2,):
        parts = pass_over(micro_batches)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), parts, whole)


def test_accumulation_does_not_change_a_run(corpus, adamw_reference, tmp_path):
    assert run(corpus, tmp_path / "run", accumulation=2, **ADAMW) == train.FINISHED
    for mine, other in zip(rows(tmp_path / "run"), rows(adamw_reference), strict=True):
        key = "loss" if "loss" in mine else "valid_loss"
        assert mine[key] == pytest.approx(other[key], abs=1e-4)


def test_evaluation_is_the_mean_over_tokens():
    llama = tiny_llama()
    params = model.init(llama, jax.random.key(0))
    short = np.zeros((4, 16))
    short[0, :5] = 1
    batches = [random_batch(1), random_batch(2, weights=short), random_batch(3, weights=0 * short)]
    result = step.evaluate(
        step.make_eval_step(lambda params, batch: objective.loss(llama, params, batch)),
        params,
        batches,
    )
    nats = []
    for batch in batches:
        logits = np.asarray(model.apply(llama, params, batch["inputs"]), np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        own = -np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        nats.extend(own[batch.get("weights", np.ones_like(own)) > 0])
    assert len(nats) == 64 + 5
    assert result == pytest.approx(np.mean(nats), abs=1e-6)


def test_evaluating_on_nothing_is_an_error():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        step.evaluate(lambda *_: None, {}, [])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--accumulation 3", "does not divide"),
        ("--steps 0", "--steps 0"),
        ("--learning-rate -1", "must be positive"),
        ("--warmup 1000", "--warmup 1000"),
        ("--optimizer adamw --rank 4", "no effect"),
        ("--clip -1", "must not be negative"),
    ],
)
def test_options_that_make_no_sense_are_refused(flags, message, tmp_path, capsys):
    line = ["--run-dir", str(tmp_path / "run"), *flags.split()]
    assert train.main(line) == train.FAILED
    assert message in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", ["--optimiser adamw", "--optimizer sgd", "--rank much"])
def test_a_bad_command_line_is_the_parsers_business(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(flags.split())
    assert stop.value.code == 2


def test_a_configuration_survives_its_file(tmp_path):
    line = ["--run-dir", "x", "--source", "files", "--paths", "a", "b", "--rank", "0.25"]
    options = config.parse(line)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_json(options)))
    assert config.load(path) == options
    path.write_text(json.dumps({"model": {}}))
    with pytest.raises(ValueError, match="another version"):
        config.load(path)


def test_state_bytes_count_the_block_matrices():
    params = {"blocks": {"q": {"kernel": jnp.zeros((2, 3, 4))}}, "norm": {"scale": jnp.zeros(5)}}
    adam = report.state_bytes(optax.scale_by_adam(), params)
    assert adam == {"total": 4 * (2 * (24 + 5) + 1), "block_matrices": 4 * 2 * 24}


def test_the_log_survives_a_full_disk(tmp_path):
    heard = []
    log = progress.MetricsLog(tmp_path, last_step=0, warn=heard.append)
    log.write([{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}])
    (tmp_path / "metrics.jsonl").rename(tmp_path / "kept")
    (tmp_path / "metrics.jsonl").mkdir()  # cannot be opened for writing
    log.write([{"step": 3, "loss": 2.0}])
    log.close()
    assert len(heard) == 1 and str(tmp_path) in heard[0]
    assert progress.read_metrics(tmp_path / "kept") == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
    ]


def test_a_comparison_is_a_table_a_plot_and_is_not_done_twice(corpus, tmp_path, monkeypatch):
    shared = tiny_run.arguments(corpus, tmp_path / "unused", steps=2)
    tail = ["--out", str(tmp_path), "--learning-rates", "1e-3", "--seeds", "0", "--", *shared]
    assert compare.main(["--variants", "adamw", *tail]) == 0

    def run_here(trial, out, shared):  # starting Python again would only take time
        assert trial.variant != "adamw", "done already"
        return train.main(trial.arguments(out, shared))

    monkeypatch.setattr(compare, "run", run_here)
    line = ["--variants", "adamw", "adamw:matrix-lr-scale=0.25", *tail]
    assert compare.main(line) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["variant"] for row in results} == {"adamw", "adamw:matrix-lr-scale=0.25"}
    table = (tmp_path / "table.md").read_text()
    assert table.count("**") == 4 and "adamw:matrix-lr-scale=0.25" in table
    assert (tmp_path / "comparison.png").exists()

    monkeypatch.setattr(compare, "run", None)  # nothing is left to do
    assert compare.main(line) == 0
    assert compare.main([*line, "--steps", "3"]) == 1, "finished runs with other options"
