"""Every example in a docstring, every snippet of the README and the quickstart run."""

import doctest
import importlib
import pkgutil
import re
import runpy
from pathlib import Path

import pytest

import galore_jax

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(galore_jax.__path__, "galore_jax.")
)
README = (ROOT / "README.md").read_text()


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
def test_readme_snippets_run_in_order():
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) >= 7
    namespace: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)


@pytest.mark.parametrize("marker", ["example command", "test command"])
def test_readme_has_one_line_commands(marker):
    block = re.search(rf"<!-- {marker} -->\n```bash\n(.*?)\n```", README, flags=re.DOTALL)
    assert block and "\n" not in block[1]


def test_readme_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.mark.standard_promotion
def test_quickstart(capsys):
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < losses[0] / 10
