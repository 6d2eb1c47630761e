"""The run in little memory is the example's run: the same start, the same first steps."""

import math

import jax
import jax.numpy as jnp
import pytest
import tiny_run

from benchmarks import limited_memory
from examples.llama import config
from examples.llama.task import make_task


@pytest.fixture
def line(tmp_path):
    """The trainer's command line, as the benchmark has it but for the sizes."""
    options = {"rank": 4, "clip": 0, "steps": 30, "dtype": "bfloat16", "param_dtype": "bfloat16"}
    (recipe, _), *_ = limited_memory.RECIPES.values()
    corpus = tiny_run.write_corpus(tmp_path)
    return [*tiny_run.arguments(corpus, tmp_path / "run", "--layerwise", **options), *recipe]


def test_it_starts_where_the_example_does(line):
    task = make_task(config.resolve(config.parse(line)))
    assert task.settings.optimizer.optimizer == "q_galore_adamw8bit"
    start = jax.jit(task.new_state)()
    assert all(map(jnp.array_equal, jax.tree.leaves(task.new_state()), jax.tree.leaves(start)))


def test_it_trains(line):
    row = limited_memory.run(line)
    assert row["skipped steps"] == 0
    # Of 64 tokens that are equally likely to a new model.
    assert row["first loss"] == pytest.approx(math.log(tiny_run.VOCAB), abs=0.1)
    assert row["last loss"] < row["first loss"] - 0.1
    assert set(limited_memory.COLUMNS) - {"note"} == row.keys()
