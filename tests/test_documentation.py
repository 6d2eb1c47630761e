"""Every example in a docstring, every snippet of a page and the quickstart run."""

import doctest
import importlib
import pkgutil
import re
import runpy

import pytest
from documents import PAGES, README, ROOT, name, snippets

import galore_jax

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(galore_jax.__path__, "galore_jax.")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name), verbose=False)
    assert result.failed == 0


def test_docstring_examples_exist():
    finder = doctest.DocTestFinder()
    examples = [
        test
        for name in MODULES
        for test in finder.find(importlib.import_module(name))
        if test.examples
    ]
    assert len(examples) > 20


@pytest.mark.standard_promotion
@pytest.mark.parametrize("page", list(filter(snippets, PAGES)), ids=name)
def test_snippets_run_in_order(page):
    namespace: dict = {}
    for snippet in snippets(page):
        exec(compile(snippet, name(page), "exec"), namespace)


def test_snippets_exist():
    assert len(snippets(README)) >= 7
    assert sum(map(len, map(snippets, PAGES))) >= 30


@pytest.mark.parametrize("marker", ["example command", "test command"])
def test_readme_has_one_line_commands(marker):
    text = README.read_text()
    block = re.search(rf"<!-- {marker} -->\n```bash\n(.*?)\n```", text, flags=re.DOTALL)
    assert block and "\n" not in block[1]


@pytest.mark.standard_promotion
def test_quickstart(capsys):
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < losses[0] / 10
