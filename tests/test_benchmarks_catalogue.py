"""Every table has one command that makes it, and every command that is written down exists."""

import importlib.util
import re
from pathlib import Path

import pytest

from benchmarks.catalogue import BENCHMARKS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TEXTS = ("README.md", "CHANGELOG.md", "benchmarks/README.md", "examples/llama/README.md")
PUBLISHES = re.compile(r"\breport\.publish\(|\bwrite\(\"")
NAMES = [benchmark.name for benchmark in BENCHMARKS]


def commands(text):
    return re.findall(r"python[3]? -m ((?:benchmarks|examples)[\w.]*)(?: (\w+))?", text)


@pytest.mark.parametrize("text", TEXTS)
def test_commands_exist(text):
    found = commands((ROOT / text).read_text())
    assert found or text == "CHANGELOG.md"
    for module, _ in found:
        assert importlib.util.find_spec(module.rstrip(".")), module


def test_commands_of_the_readme_are_in_the_catalogue():
    tools = {"benchmarks", "benchmarks.readme"}
    known = {benchmark.path for benchmark in BENCHMARKS} | tools
    found = {module for module, _ in commands((ROOT / "README.md").read_text())}
    assert {module for module in found if module.startswith("benchmarks")} <= known


def test_names_and_tables_are_unique():
    tables = [table for benchmark in BENCHMARKS for table in benchmark.writes]
    assert len(set(NAMES)) == len(NAMES)
    assert len(set(tables)) == len(tables)


def test_every_result_has_a_producer():
    tables = {table for benchmark in BENCHMARKS for table in benchmark.writes}
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert {path.stem for path in files} - tables == set()


def test_every_producer_has_its_result():
    measured = [benchmark for benchmark in BENCHMARKS if benchmark.place != "gpu"]
    tables = {table for benchmark in measured for table in benchmark.writes}
    assert tables - {path.stem for path in RESULTS.glob("*.md")} == set()


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=NAMES)
def test_a_module_names_the_tables_that_it_writes(benchmark):
    source = Path(importlib.util.find_spec(benchmark.path).origin).read_text()
    module = benchmark.path.partition(".")[2]
    for table in benchmark.writes:
        composed = table.startswith(f"{module}_") and f'f"{module}_{{' in source
        assert f'"{table}"' in source or table in benchmark.arguments or composed
    assert benchmark.about().endswith(".")


def test_every_module_that_publishes_is_in_the_catalogue():
    paths = {benchmark.path for benchmark in BENCHMARKS}
    modules = {
        f"benchmarks.{path.stem}"
        for path in (ROOT / "benchmarks").glob("*.py")
        if PUBLISHES.search(path.read_text()) and 'if __name__ == "__main__"' in path.read_text()
    }
    assert len(modules) > 10
    assert modules == paths


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=NAMES)
def test_trials_are_for_options_that_exist(benchmark):
    source = Path(importlib.util.find_spec(benchmark.path).origin).read_text()
    own = [*benchmark.trial, "--"][: [*benchmark.trial, "--"].index("--")]
    for argument in (*own, *benchmark.arguments):
        if argument.startswith("--"):
            assert f'add_argument("{argument}"' in source
