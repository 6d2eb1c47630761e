"""Running benchmarks: what fails, what cannot run, where tables go; processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_jax as gj
from benchmarks import __main__ as program
from benchmarks import isolated, limited_memory, report, throughput
from benchmarks.catalogue import BENCHMARKS, Benchmark

GOOD = Benchmark("good", ("one", "two"))
BAD = Benchmark("bad", ("three",))
IDLE = Benchmark("idle", ("four",))
ABSENT = Benchmark("absent", ("five",), needs="no-such-package")


@pytest.fixture
def processes(monkeypatch):
    """Benchmarks whose processes do nothing but write their files: the command lines, and where."""
    started = []

    def run(command, cwd=None, env=None):
        name = command[2].removeprefix("benchmarks.")
        started.append((name, env))
        out = Path(env[report.RESULTS_VARIABLE])
        out.mkdir(parents=True, exist_ok=True)
        for file in {b.name: b for b in program.BENCHMARKS}[name].files if name != "idle" else ():
            (out / file).write_text("")
        return subprocess.CompletedProcess(command, 7 if name == "bad" else 0)

    monkeypatch.setattr(program, "BENCHMARKS", (BAD, GOOD, IDLE, ABSENT))
    monkeypatch.setattr(program, "BY_NAME", {b.name: b for b in program.BENCHMARKS})
    monkeypatch.setattr(program, "default_backend", lambda: "cpu")
    monkeypatch.setattr(program.subprocess, "run", run)
    return started


def test_a_failure_does_not_stop_the_others(processes, tmp_path, capsys):
    assert program.main(["--out", str(tmp_path)]) == 1
    assert [name for name, _ in processes] == ["bad", "good", "idle"]
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if "|" in line}
    assert "FAILED with status 7" in lines["bad"]
    assert "FAILED: did not write four.md, four.json" in lines["idle"]
    assert "not run: needs no-such-package" in lines["absent"]
    assert "| ok" in lines["good"] and "one.md" in lines["good"] and "two.md" in lines["good"]


def test_what_cannot_run_fails_only_if_it_was_asked_for(processes, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "BENCHMARKS", (GOOD, ABSENT))
    assert program.main(["--out", str(tmp_path)]) == 0
    assert program.main(["--out", str(tmp_path), "absent"]) == 1


def test_tables_of_an_earlier_run_do_not_count(processes, tmp_path):
    for file in IDLE.files:
        (tmp_path / file).write_text("")
        os.utime(tmp_path / file, (0, 0))
    assert program.main(["--out", str(tmp_path), "idle"]) == 1


@pytest.mark.slow
def test_a_real_trial(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "captured_energy", "--quick", "--out", tmp_path]
    subprocess.run(command, cwd=program.ROOT, check=True, stdout=subprocess.DEVNULL)
    result = json.loads((tmp_path / "captured_energy.json").read_text())
    exact = result["rows"][0]
    assert exact["projector"] == "svd" and exact["flat, cold"] == pytest.approx(1.0, abs=1e-5)
    assert result["command"] == "python -m benchmarks.captured_energy --shape 64 172 --rank 16"
    assert {"device", "processor", "load", "jax", "optax"} <= result["environment"].keys()


def test_without_a_gpu_it_says_that_nothing_was_run(processes, capsys):
    assert program.main(["--gpu"]) == 1
    assert processes == []
    assert "Not run" in capsys.readouterr().out


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        program.main(["no_such_benchmark"])
    assert "no_such_benchmark" in capsys.readouterr().err


def test_what_is_chosen():
    everywhere = program.chosen([], gpu=False)
    assert {b.place for b in everywhere} == {"here", "anywhere"}
    assert len(everywhere) == sum(b.place != "gpu" for b in BENCHMARKS)
    on_gpu = program.chosen([], gpu=True)
    assert {"throughput", "limited_memory", "optimizer_step"} <= {b.name for b in on_gpu}
    assert all(b.place != "anywhere" for b in on_gpu)


def test_results_of_another_device_lie_beside_those_of_the_readme():
    counting = Benchmark("x", ("x",), place="anywhere")
    assert program.destination(GOOD, "cpu", quick=False) == program.RESULTS
    assert program.destination(GOOD, "gpu", quick=False) == program.RESULTS / "gpu"
    assert program.destination(counting, "gpu", quick=False) == program.RESULTS
    assert program.destination(GOOD, "cpu", quick=True) == program.TRIAL_RESULTS
    assert program.environment(counting, Path("x"))["JAX_PLATFORMS"] == "cpu"


def test_publish_writes_where_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(report.RESULTS_VARIABLE, str(tmp_path))
    report.publish("A title", [{"a": 1.23456, "b": "x"}], "table", {"torchao": "not installed"})
    text = (tmp_path / "table.md").read_text()
    assert "| 1.235 | x |" in text and "Left out: torchao, not installed." in text
    assert text in capsys.readouterr().out
    assert '"a": 1.23456' in (tmp_path / "table.json").read_text()


def test_a_process_of_its_own():
    assert isolated.call(os.getpid) != os.getpid()
    assert isolated.call(os.getenv, "GALORE_JAX_X", environment={"GALORE_JAX_X": "1"}) == "1"
    assert os.getenv("GALORE_JAX_X") is None
    with pytest.raises(ValueError, match="invalid literal"):
        isolated.call(int, "x")


def test_a_lack_of_memory_becomes_a_row():
    assert isolated.row(jnp.zeros, (2**46,)) == {"note": "out of memory"}


def test_other_errors_do_not(monkeypatch):
    def call(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: no idea")

    monkeypatch.setattr(isolated, "call", call)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        isolated.row(dict)


def test_the_pool_is_a_fraction_of_the_device():
    variables = limited_memory.limit(15_000_000_000, 80_000_000_000)
    assert float(variables["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == pytest.approx(0.1875)
    assert variables["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    assert limited_memory.limit(1, None) == {}


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "tx, bases",
    [
        (gj.galore_adamw(1e-2, 4, update_proj_gap=1000), lambda state: state[0].projectors["w"]),
        (optax.contrib.galore(1e-2, 4, 1000), lambda state: state[0].projector["w"]),
    ],
    ids=["galore_jax", "optax"],
)
@pytest.mark.sampled(1)
def test_a_refresh_that_is_made_due_happens(tx, bases):
    def gradient(seed):
        return {"w": jax.random.normal(jax.random.key(seed), (16, 12))}

    params = {"w": jnp.ones((16, 12))}
    state = tx.update(gradient(0), tx.init(params), params)[1]
    later = tx.update(gradient(1), state, params)[1]
    assert jnp.array_equal(bases(later), bases(state))
    moved = tx.update(gradient(1), throughput.refresh_is_due(later), params)[1]
    assert not jnp.allclose(bases(moved), bases(state), atol=1e-2)
