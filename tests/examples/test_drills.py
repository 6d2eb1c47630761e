"""Faults of a training run: one of each kind here, all of them behind ``-m slow``.

What a single checkpoint, a corpus or a configuration survives is tested where they are.
"""

import itertools
import json
import shutil

import numpy as np
import pytest

from benchmarks import drills, report
from benchmarks.faults import DRILLS, numbers, processes, refusals, storage
from benchmarks.faults.ground import Fault, Ground, ImpossibleError, Outcome
from benchmarks.faults.runs import VARIANTS, DrillError, insist_same

STEPS = 60


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground(tmp_path_factory.mktemp("drills"), steps=STEPS)


def survive(faults):
    """Tries all of them; what became of each."""
    outcomes = [fault.attempt() for fault in faults]
    assert outcomes
    return outcomes


def named(faults, *names):
    found = [fault for fault in faults if fault.name in names]
    assert {fault.name for fault in found} == set(names)
    return found


def test_a_kill(ground):
    (outcome,) = survive(named(processes.kill(ground), "plain"))
    assert outcome.times == 1


def test_a_signal(ground):
    survive(named(processes.stop(ground), "SIGTERM, plain"))


@pytest.mark.slow
def test_a_full_disk(ground):
    try:
        survive(storage.disk(ground))
    except ImpossibleError as error:
        pytest.skip(str(error))


def test_damaged_files(ground):
    faults = list(storage.damage(ground))
    files = {name: list(group) for name, group in itertools.groupby(faults, lambda f: f.name)}
    *single, everything = files.values()
    assert len(single) == 3 and all(len(group) > 3 for group in single)
    survive([single[0][0], *everything])


def test_a_loss_that_is_no_number_on_a_refresh(ground):
    _, second, _ = named(numbers.no_number(ground), "nan, layerwise")
    survive([second])


def test_a_gradient_of_zeros_on_a_refresh(ground):
    _, second = named(numbers.zeros(ground), "plain")
    survive([second])


def test_corpora(ground):
    assert len(survive(refusals.corpora(ground))) == 7


def test_another_run(ground):
    survive(
        named(
            refusals.another_run(ground),
            "weights in int8",
            "a corpus with a bit flipped",
            "another tokenizer",
        )
    )


# That a drill would notice.


def test_a_number_that_differs_is_noticed(ground):
    reference = ground.reference(VARIANTS["plain"])
    insist_same(ground.copy(reference), reference)
    other = ground.copy(reference)
    log = other.directory / "metrics.jsonl"
    first, *rest = log.read_text().splitlines()
    log.write_text("\n".join([json.dumps(json.loads(first) | {"loss": 0.0}), *rest]) + "\n")
    with pytest.raises(DrillError, match="the log has"):
        insist_same(other, reference)
    short = ground.copy(reference)
    shutil.rmtree(short.newest)
    with pytest.raises(DrillError, match="the last state"):
        insist_same(short, reference)


def test_a_leaf_that_differs_is_noticed(ground, monkeypatch):
    reference = ground.reference(VARIANTS["plain"])
    copy = ground.copy(reference)
    arrays = copy.arrays(copy.saved)
    name = next(iter(arrays))
    harmed = arrays | {name: np.frombuffer(arrays[name].tobytes(), np.uint8) ^ 1}
    monkeypatch.setattr(type(copy), "arrays", lambda run, _: harmed if run == copy else arrays)
    with pytest.raises(DrillError, match=f"{name} differs"):
        insist_same(copy, reference)


def test_the_tally(tmp_path, monkeypatch, capsys):
    def fails():
        raise DrillError("it is gone")

    def impossible():
        raise ImpossibleError("needs a disk")

    faults = [
        Fault("easy", lambda: Outcome(lost=1, seen="fine")),
        Fault("easy", lambda: Outcome(lost=3, seen="fine")),
        Fault("hard", fails, times=5),
        Fault("elsewhere", impossible),
    ]
    monkeypatch.setitem(drills.DRILLS, "some", lambda _: iter(faults))
    monkeypatch.setenv(report.RESULTS_VARIABLE, str(tmp_path))
    assert drills.main(["--only", "some"]) == 1
    rows = json.loads((tmp_path / "drills.json").read_text())["rows"]
    assert [list(row.values()) for row in rows] == [
        ["some", "easy", 2, 2, 3, "fine"],
        ["some", "hard", 5, 0, 0, "DrillError: it is gone"],
        ["some", "elsewhere", 0, 0, 0, "not tried: needs a disk"],
    ]
    assert "| some | hard | 5 | 0 | 0 |" in capsys.readouterr().out
    monkeypatch.setitem(drills.DRILLS, "some", lambda _: iter(faults[:2]))
    assert drills.main(["--only", "some"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", DRILLS)
def test_every_drill(name, tmp_path):
    lines = list(drills.held(name, Ground(tmp_path, kills=12)))
    assert lines and all(line.survived == line.times for line in lines), lines
