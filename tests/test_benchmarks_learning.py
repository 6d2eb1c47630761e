"""The grids of the comparison make the published lines, in the form in which they are published."""

import itertools

import pytest

from benchmarks import claims, learning
from examples.llama import compare


def points(grids):
    return {
        (learning.short(variant), rate, seed)
        for grid in grids
        for variant, rate, seed in itertools.product(*grid)
    }


def published(name):
    (_, lines) = next(claims.tables((claims.RESULTS / f"{name}.md").read_text()))
    return [[claims.plain(cell) for cell in line] for line in lines]


def test_the_grids_make_every_published_line():
    made = {(variant, f"{rate:g}") for variant, rate, _ in points(learning.TRANSPORTS)}
    assert {tuple(line[:2]) for line in published("learning")} == made


def test_the_grids_make_every_published_line_in_few_bits():
    trials = [compare.Trial(*point) for point in points((*learning.FEW_BITS, *learning.LONGER))]
    made = {trial.directory(claims.RESULTS).name for trial in trials}
    lines = published("learning_in_few_bits")
    wanted = {f"{line[0]}-seed_{seed}" for line in lines for seed in line[2].split(", ")}
    assert wanted <= made
    assert {name.rpartition("-seed_")[0] for name in made} == {line[0] for line in lines}


@pytest.mark.parametrize("grids", [learning.TRANSPORTS, learning.FEW_BITS, learning.LONGER])
def test_no_run_is_made_twice(grids):
    assert len(points(grids)) == sum(len(list(itertools.product(*grid))) for grid in grids)


def test_a_line_in_few_bits():
    row = {
        "variant": "q_galore_adamw8bit:rank=0.25,weights=int8-lr_0.01",
        "steps": 500,
        "seeds": [0, 1],
        "validation loss": [4.0, 4.2],
        "refreshes": [1234, 237],
    }
    *_, line = learning.few_bits_table([row]).splitlines()
    name = "q_galore_adamw8bit-rank_0.25-weights_int8-lr_0.01"
    assert line == f"| {name} | 500 | 0, 1 | 4.1000 ± 0.1414 | 1234, 237 |"
