"""The documentation: complete, its links lead somewhere, its commands are commands."""

from __future__ import annotations

import ast
import html
import inspect
import posixpath
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import yaml
from documents import PAGES, README, ROOT, commands, links, name

import galore_jax as gj
from examples.llama import config

API = sorted((ROOT / "docs" / "api").glob("*.md"))
REFERENCES = re.findall(r"^::: (\S+)$", "\n".join(page.read_text() for page in API), re.MULTILINE)
MODULES = (
    "projectors",
    "refresh",
    "transport",
    "codecs",
    "recovery",
    "quant",
    "backward",
    "layerwise",
    "memory",
)
# Parts of other things: what operators and policies are made of, for the package's own use; and
# names that are documented at the top level.
INTERNAL = {
    "projectors": {
        "HIGHEST",
        "dense_operator",
        "mean_operator",
        "orthonormalize",
        "working_dtype",
    },
    "refresh": {"as_policy", "phases"},
    "quant": {"matmul"},
    "memory": {"tree_bytes"},
    "backward": {"matmul", "projected_value_and_grad"},
}


def resolve(path):
    """The object that a dotted path names."""
    thing = gj
    for part in path.split(".")[1:]:
        thing = getattr(thing, part)
    return thing


def anchors(page):
    """What a link to a heading of the page may say after its #."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {
        re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def exported(module):
    """Its public names: a module without a list of them exports what it defines."""
    own = {n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__}
    return set(getattr(module, "__all__", {n for n in own if not n.startswith("_")}))


def test_reference_holds_every_public_name_once():
    modules = {module for module in gj.__all__ if not callable(getattr(gj, module))}
    wanted = {f"galore_jax.{public}" for public in set(gj.__all__) - modules}
    wanted |= {"galore_jax.STATIC_ARGS"}
    for module in MODULES:
        names = exported(getattr(gj, module)) - INTERNAL.get(module, set())
        assert names
        wanted |= {f"galore_jax.{module}.{public}" for public in names}
    assert len(REFERENCES) == len(set(REFERENCES))
    assert wanted <= set(REFERENCES)


@pytest.mark.parametrize("reference", REFERENCES)
def test_references_name_something_that_explains_itself(reference):
    thing = resolve(reference)
    assert reference == "galore_jax.STATIC_ARGS" or thing.__doc__


def docstrings():
    """(file, node) of whatever in the package has a docstring."""
    for path in sorted((ROOT / "galore_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            kinds = ast.Module | ast.ClassDef | ast.FunctionDef
            if isinstance(node, kinds) and ast.get_docstring(node):
                yield path, node


def begins_as_a_question(node):
    """ "Whether ..." is fine for a bool, and nothing else that asks."""
    returns = getattr(node, "returns", None)
    is_bool = returns is not None and ast.unparse(returns) == "bool"
    words = "What|How|Where|Who|Whose|When|Which|Why" + ("" if is_bool else "|Whether")
    return re.match(rf"({words})\b", ast.get_docstring(node)) is not None


def test_docstrings_begin_with_a_thing_or_a_verb():
    found = list(docstrings())
    asking = [
        f"{name(path)}: {ast.get_docstring(n)}" for path, n in found if begins_as_a_question(n)
    ]
    assert len(found) > 500 and asking == []


@pytest.mark.parametrize(
    "source, asks",
    [
        ('def f() -> bool:\n  "Whether it fits."', False),
        ('def f() -> str:\n  "Whether it fits."', True),
        ('def f(x):\n  "How it is done."', True),
        ('class A:\n  "Whatever fits."', False),
    ],
)
def test_the_rule_of_docstrings(source, asks):
    assert begins_as_a_question(ast.parse(source).body[0]) == asks


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    navigation = yaml.safe_load(text)["nav"]
    entries = re.findall(r"[\w/]+\.md", str(navigation))
    pages = [name(page).removeprefix("docs/") for page in PAGES if page != README]
    assert sorted(entries) == sorted([*pages, "readme.md"])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = ROOT / posixpath.normpath(posixpath.join(posixpath.dirname(name(page)), path))
        target = target if path else page
        assert target.exists(), f"{link} in {name(page)}"
        assert not anchor or anchor in anchors(target), f"{link} in {name(page)}"


COMMANDS = [
    pytest.param(arguments, id=f"{name(page)} {' '.join(arguments)}")
    for page in [*PAGES, ROOT / "examples" / "llama" / "README.md"]
    for arguments in commands(page, "examples.llama.train")
    if "--help" not in arguments and "$i" not in arguments
]


@pytest.mark.parametrize("arguments", COMMANDS)
def test_commands_are_understood(arguments):
    config.resolve(config.parse(arguments))


def test_there_are_commands():
    assert len(COMMANDS) > 8


def test_losses_are_those_of_the_results():
    number = r"\b[34]\.\d{3,4}\b"
    results = (ROOT / "benchmarks" / "results").glob("learning*.md")
    measured = {
        round(float(x), 3) for page in results for x in re.findall(number, page.read_text())
    }
    quoted = [float(x) for x in re.findall(number, (ROOT / "docs" / "choosing.md").read_text())]
    assert len(quoted) > 5 and set(quoted) <= measured


def test_tutorials_are_all_shown():
    shown = re.findall(r'--8<-- "(.+)"', (ROOT / "docs" / "tutorials.md").read_text())
    files = {name(path) for path in (ROOT / "examples" / "tutorials").glob("*.py")}
    assert set(shown) == files - {f"examples/tutorials/{n}.py" for n in ("__init__", "text")}


def test_picture_explains_itself():
    picture = ElementTree.parse(ROOT / "docs" / "architecture.svg").getroot()
    tags = {element.tag.rpartition("}")[2]: element for element in picture.iter()}
    assert tags["title"].text and tags["desc"].text
    assert "prefers-color-scheme: dark" in tags["style"].text


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where the site was built, by the command that the documentation gives."""
    pytest.importorskip("mkdocstrings", reason="needs the extra `docs`")
    directory = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return directory


def plain(text):
    """Words only: no tags, no backticks, no line breaks."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).replace("`", "").split())


def test_site_explains_every_name(site):
    pages = {
        page.stem: plain((site / "api" / page.stem / "index.html").read_text()) for page in API
    }
    for page in API:
        for reference in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE):
            if reference != "galore_jax.STATIC_ARGS":
                summary = inspect.getdoc(resolve(reference)).partition("\n")[0]
                assert plain(summary) in pages[page.stem], reference


def test_site_names_every_argument_of_an_optimizer(site):
    page = plain((site / "api" / "aliases" / "index.html").read_text())
    for public in filter(re.compile("(q_)?galore").match, gj.__all__):
        shown = re.search(rf"\b{public}\(([^)]*)\)", page)[1].split(",")
        names = [argument.partition("=")[0].strip() for argument in shown]
        assert [n for n in names if n.isidentifier()] == list(
            inspect.signature(getattr(gj, public)).parameters
        )


def test_site_draws_formulas_and_examples(site):
    assert "<math" in (site / "api" / "lens" / "index.html").read_text()
    for page in site.glob("api/*/index.html"):
        text = page.read_text()
        assert ".. math::" not in text and ":math:" not in text, page
        assert not re.search(r"<p>\s*(&gt;){3} ", text), page  # an example that is no code
        assert not re.search(r"</p>\s*<math", text), page  # a formula torn out of its sentence


def test_site_holds_what_pages_link_to(site):
    for place in ("readme/index.html", "examples/llama/index.html", "examples/quickstart.py"):
        assert (site / place).is_file()
    assert not (site / "pages.py").exists()
