"""optax's own tests of contributed optimizers, run on ours."""

from __future__ import annotations

import importlib.util
import inspect
import types
import unittest
from pathlib import Path

import jax
import optax
import pytest

import galore_jax as gj

OPTIONS = [
    {"learning_rate": 1e-2, "rank": 8},
    # Rank 1 of 2: the matrices of the suite really are projected.
    {"learning_rate": 1e-2, "rank": 1, "update_proj_gap": 5},
]
OURS = [
    {"opt_name": "galore", "opt_kwargs": options, "wrapper_name": None, "wrapper_kwargs": None}
    for options in OPTIONS
]


def _galore(*args, **options):
    return gj.galore(*args, **options)


# They compare annotations, which are strings in our module, with optax.ScalarOrSchedule itself.
_galore.__signature__ = inspect.signature(gj.galore, eval_str=True)


def _suite() -> type[unittest.TestCase]:
    """Their test class, with our factory in the place of theirs and in the only row of the tables.

    The tables are arguments of decorators, so they have to be replaced before the class is made:
    right before the helper that follows them in the source.
    """
    spec = importlib.util.find_spec("optax.contrib._common_test")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text()
    marker = "def _get_opt_factory(opt_name):"
    assert source.count(marker) == 1, "optax has reorganised its tests"
    tables = "_MAIN_OPTIMIZERS_UNDER_TEST = _ALL_OPTIMIZERS_UNDER_TEST = _OURS\n"
    module = types.ModuleType("optax_contrib_suite")
    module.__dict__["_OURS"] = tuple(OURS)
    exec(compile(source.replace(marker, tables + marker), spec.origin, "exec"), module.__dict__)
    module.__dict__["_get_opt_factory"] = lambda name: {"galore": _galore}[name]
    return module.__dict__["ContribTest"]


# In a tuple, for pytest collects every test case it finds in a module by itself.
SUITE = (_suite(),)
NAMES = unittest.TestLoader().getTestCaseNames(SUITE[0])


def test_the_suite_is_there():
    kinds = {name.rstrip("0123456789") for name in NAMES}
    assert len(NAMES) >= 16 * len(OPTIONS)
    assert len(kinds) >= 7


@pytest.mark.parametrize("name", NAMES)
def test_optax_suite(name):
    result = unittest.TestResult()
    # Their objectives and their Adam promote.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        SUITE[0](name).run(result)
    assert result.testsRun == 1
    problems = [text for _, text in result.failures + result.errors]
    assert not problems, problems[0]
    assert not result.skipped, result.skipped


def test_the_suite_can_fail(monkeypatch):
    broken = optax.sgd(1e-2)
    monkeypatch.setattr(gj, "galore", lambda **_: optax.chain(broken, optax.scale(-1.0)))
    name = next(name for name in NAMES if name.startswith("test_optimizers0"))
    result = unittest.TestResult()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        SUITE[0](name).run(result)
    assert result.failures or result.errors
