"""The trainer as several processes: stopped, killed, and resumed on other devices."""

import contextlib
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
import tiny_run
from tiny_run import SHORT, arrays, rows

from examples.llama import host, progress, train

GALORE = {"optimizer": "galore_adamw", "rank": 4, "gap": 5}
RUN = GALORE | SHORT | {"steps": 48, "save-every": 6, "eval-every": 24, "log-every": 1}
MINUTE = 60


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Processes:
    """Trainers that are one run; what each printed is in a file of its own."""

    def __init__(self, output, *lines):
        output.mkdir(exist_ok=True)
        self.outputs = [output / f"{len(list(output.iterdir()))}-{i}" for i in range(len(lines))]
        self.processes = []
        for line, path in zip(lines, self.outputs, strict=True):
            with path.open("w") as file:
                self.processes.append(
                    subprocess.Popen(tiny_run.command(line), stdout=file, stderr=subprocess.STDOUT)
                )

    def text(self, number):
        return self.outputs[number].read_text()

    def wait(self, timeout=2 * MINUTE):
        """Exit statuses; nothing that hangs outlives the test."""
        end = time.monotonic() + timeout
        with contextlib.ExitStack() as stack:
            for process in self.processes:
                stack.callback(process.kill)
            return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]

    def wait_for_step(self, run_dir, number):
        path = run_dir / "metrics.jsonl"
        for _ in range(20 * 2 * MINUTE):
            if path.exists() and any(row["step"] >= number for row in progress.read_metrics(path)):
                return
            dead = [i for i, process in enumerate(self.processes) if process.poll() is not None]
            assert not dead, self.text(dead[0])
            time.sleep(0.05)
        self.wait(0)
        raise AssertionError("did not get there in two minutes")


@pytest.fixture(scope="module")
def start(corpus):
    """`start(run_dir, processes, devices of each, flags, options)`."""

    def start(run_dir, count, devices, *flags, **options):
        place = {"cpu-devices": devices}
        if count > 1:
            place |= {"coordinator": f"localhost:{free_port()}", "num-processes": count}
            flags = ("--distributed", *flags)
        lines = [
            tiny_run.arguments(
                corpus,
                run_dir,
                *flags,
                **(RUN | options | place | ({"process-id": i} if count > 1 else {})),
            )
            for i in range(count)
        ]
        return Processes(run_dir.parent / "output", *lines)

    return start


def losses(run_dir):
    return np.array([row.get("loss", row.get("valid_loss")) for row in rows(run_dir)])


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    """Two processes that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    processes = start(run_dir, 2, 1)
    assert processes.wait() == [0, 0], processes.text(0)
    assert "2 x cpu, data=2, 2 processes" in processes.text(0)
    assert "validation loss" in processes.text(0)
    assert "loss" not in processes.text(1), "one of them speaks for all"
    assert len(losses(run_dir)) == 50
    return run_dir


@pytest.fixture(scope="module")
def killed(start, reference, tmp_path_factory):
    """The same run after a SIGTERM to one process, and later a SIGKILL to one."""
    run_dir = tmp_path_factory.mktemp("killed") / "run"
    processes = start(run_dir, 2, 1)
    processes.wait_for_step(run_dir, 10)
    processes.processes[1].send_signal(signal.SIGTERM)
    assert processes.wait() == [128 + signal.SIGTERM] * 2, processes.text(0)
    stopped = max(row["step"] for row in rows(run_dir))
    saved = re.search(r"SIGTERM: saved step (\d+); go on with", processes.text(0))
    assert int(saved[1]) == stopped < 48
    assert newest(run_dir) == stopped

    processes = start(run_dir, 2, 1, "--resume")
    processes.wait_for_step(run_dir, stopped + 10)
    processes.processes[1].kill()
    # The other one does not wait for ever, and says so.
    status, dead = processes.wait(MINUTE)
    assert dead == -signal.SIGKILL and status != 0
    assert re.search(r"ERROR: process 0: .*--resume|another task died", processes.text(0), re.S)
    assert newest(run_dir) < 48
    return run_dir


def newest(run_dir):
    names = [path.name for path in (run_dir / "checkpoints").iterdir()]
    return max(int(name) for name in names if name.isdigit())


def copy_of(killed, directory):
    shutil.copytree(killed, directory)
    return directory


def test_two_processes_stop_and_one_goes_on(start, corpus, tmp_path):
    """Both need every row of a batch, the devices of each share the matrices; then one has all."""
    run_dir = tmp_path / "run"
    processes = start(run_dir, 2, 2, mesh="tensor=2,fsdp=2")
    processes.wait_for_step(run_dir, 4)
    processes.processes[1].send_signal(signal.SIGTERM)
    assert processes.wait() == [128 + signal.SIGTERM] * 2, processes.text(0)
    assert "4 x cpu, tensor=2, fsdp=2, 2 processes" in processes.text(0)
    assert "loss" not in processes.text(1), "one of them speaks for all"
    stopped = max(row["step"] for row in rows(run_dir))
    assert f"SIGTERM: saved step {stopped}; go on with" in processes.text(0)
    assert newest(run_dir) == stopped < 48

    assert train.main(["--run-dir", str(run_dir), "--resume"]) == train.FINISHED
    assert tiny_run.run(corpus, tmp_path / "alone", **RUN) == train.FINISHED
    assert len(losses(run_dir)) == 50
    np.testing.assert_allclose(losses(run_dir), losses(tmp_path / "alone"), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_go_on_anywhere(start, corpus, killed, reference, tmp_path):
    """One test, so that what it starts from is made once, however many workers there are."""
    same = copy_of(killed, tmp_path / "same")
    processes = start(same, 2, 1, "--resume")
    assert processes.wait() == [0, 0], processes.text(0)
    assert "resumed    at step" in processes.text(0)
    assert rows(same) == rows(reference), "bit for bit"
    wanted, found = arrays(reference, 48), arrays(same, 48)
    assert wanted.keys() == found.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)

    one = copy_of(killed, tmp_path / "one")
    assert train.main(["--run-dir", str(one), "--resume"]) == train.FINISHED
    np.testing.assert_allclose(losses(one), losses(reference), rtol=1e-4)

    four = copy_of(killed, tmp_path / "four")
    processes = start(four, 1, 4, "--resume", mesh="data=2,fsdp=2")
    assert processes.wait() == [0], processes.text(0)
    assert "4 x cpu, data=2, fsdp=2" in processes.text(0)
    np.testing.assert_allclose(losses(four), losses(reference), rtol=1e-4)

    assert tiny_run.run(corpus, tmp_path / "alone", **RUN) == train.FINISHED
    np.testing.assert_allclose(losses(tmp_path / "alone"), losses(reference), rtol=1e-5)


def test_all_give_up_together(start, tmp_path):
    options = {"learning-rate": 1e30, "warmup": 0, "max-bad-steps": 2, "save-every": 48}
    processes = start(tmp_path / "run", 2, 1, **options)
    assert processes.wait() == [train.GAVE_UP] * 2, processes.text(0)
    assert "2 steps in a row" in processes.text(0)


def test_all_are_refused_together(start, tmp_path):
    """Without --resume in a directory that is not empty; at once, not after a time-out."""
    run_dir, began = tmp_path / "run", time.monotonic()
    (run_dir / "checkpoints").mkdir(parents=True)
    processes = start(run_dir, 2, 1)
    assert processes.wait() == [train.FAILED] * 2, processes.text(0)
    assert time.monotonic() - began < MINUTE
    first, second = (" ".join(processes.text(i).split()) for i in (0, 1))
    assert re.search(r"ERROR: process 0: .* is not empty: add --resume", first)
    assert "ERROR: process 1: process 0 stopped all of them" in second


def test_processes_with_different_options_do_not_train(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(host, "from_leader", lambda decide: decide() | {"--rank": 8})
    assert tiny_run.run(corpus, tmp_path / "run", **RUN) == train.FAILED
    assert "--rank is 4 here and 8 in process 0" in " ".join(capsys.readouterr().out.split())


def test_a_straggler_keeps_the_next_run_out(corpus, tmp_path, capsys):
    """The directory is locked as long as any process of a run is alive."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        assert tiny_run.run(corpus, tmp_path, "--resume", **RUN) == train.FAILED
    finally:
        os.close(descriptor)
    assert "another process is training in" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.slow
def test_being_killed_many_times_changes_nothing(start, reference, tmp_path):
    """Any process, at any moment, saves and restores included."""
    run_dir, moments = tmp_path / "run", random.Random(0)
    for _ in range(6):
        processes = start(run_dir, 2, 1, "--resume", **{"save-every": 1})
        logged = rows(run_dir) if (run_dir / "metrics.jsonl").exists() else []
        processes.wait_for_step(run_dir, max((row["step"] for row in logged), default=0) + 1)
        time.sleep(moments.uniform(0.0, 0.5))
        processes.processes[moments.randrange(2)].kill()
        assert all(status != 0 for status in processes.wait(3 * MINUTE))
    processes = start(run_dir, 2, 1, "--resume")
    assert processes.wait() == [0, 0], processes.text(0)
    assert rows(run_dir) == rows(reference)


@pytest.mark.slow
def test_the_preset_tiny_goes_on_anywhere(tmp_path):
    """The real thing: speeches, 3 million parameters, both processes killed in the middle."""
    recipe = (
        "--preset tiny --steps 24 --save-every 6 --eval-every 12 --log-every 1 --eval-batches 2"
    )

    def start(run_dir, place, *flags):
        if "distributed" not in place:
            lines = [[]]
        else:
            lines = [["--process-id", str(i)] for i in range(2)]
            place += f" --coordinator localhost:{free_port()} --num-processes 2"
        shared = [*recipe.split(), *place.split(), "--run-dir", str(run_dir), *flags]
        return Processes(tmp_path / "output", *([*shared, *line] for line in lines))

    two = "--distributed --cpu-devices 1"
    processes = start(tmp_path / "reference", two)
    assert processes.wait(10 * MINUTE) == [0, 0], processes.text(0)

    processes = start(tmp_path / "killed", two)
    processes.wait_for_step(tmp_path / "killed", 15)
    for process in processes.processes:
        process.kill()
    processes.wait()
    assert 0 < newest(tmp_path / "killed") < 24

    whole = losses(tmp_path / "reference")
    for name, place, rtol in (
        ("two", two, 0.0),
        ("one", "--cpu-devices 1", 1e-4),
        ("four", "--cpu-devices 4 --mesh data=2,fsdp=2", 1e-4),
    ):
        run_dir = copy_of(tmp_path / "killed", tmp_path / name)
        processes = start(run_dir, place, "--resume")
        assert set(processes.wait(10 * MINUTE)) == {0}, processes.text(0)
        np.testing.assert_allclose(losses(run_dir), whole, rtol=rtol, err_msg=name)
