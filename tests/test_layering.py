"""Imports go down the layers of the package, never up and never sideways."""

import ast
import sys
from pathlib import Path

import pytest

import galore_jax

ROOT = Path(galore_jax.__file__).parent
# From the bottom; families within a layer do not know each other.
LAYERS = [
    {"checks", "leaves", "rules", "serialization", "signatures", "tables"},
    {"collectives", "keys", "meshes", "views"},
    {"quant"},
    {"codecs"},
    {"projectors", "recovery", "refresh", "transport"},
    {"transforms"},
    {"alias", "backward", "describe", "memory", "metrics", "sharding"},
    {"layerwise"},
    {"__init__"},
]
MODULES = sorted(ROOT.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in MODULES]


def family(module):
    """`galore_jax.views.axes` and `views/axes.py` both belong to `views`."""
    if isinstance(module, Path):
        return module.relative_to(ROOT).with_suffix("").parts[0]
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def layer(name):
    return next((i for i, families in enumerate(LAYERS) if name in families), None)


def imports(tree):
    """Every imported module, however deep in the code; `from a import b` may mean `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def at_module_level(tree):
    body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return ast.Module(body, type_ignores=[])


@pytest.fixture(params=MODULES, ids=NAMES)
def module(request):
    return request.param


def test_every_family_has_a_layer():
    assert {family(path) for path in MODULES} - set.union(*LAYERS) == set()


def violations(source, path):
    """Imports of the package that `path` may not have."""
    ours = family(path)
    for name in imports(ast.parse(source)):
        if name.split(".")[0] != "galore_jax":
            continue
        theirs = family(name)
        if theirs == ours or (layer(theirs) is not None and layer(theirs) < layer(ours)):
            continue
        yield name


def test_downwards_only(module):
    assert list(violations(module.read_text(), module)) == []


@pytest.mark.parametrize(
    "line, path, fine",
    [
        ("import galore_jax.views", "transport/x.py", True),
        ("from galore_jax import keys", "projectors/x.py", True),
        ("from galore_jax.views import axes", "views/x.py", True),
        ("from galore_jax.refresh import every", "transport/x.py", False),
        ("from galore_jax import refresh", "transport/x.py", False),
        ("from galore_jax import keys", "views/x.py", False),
        ("from galore_jax.transforms import config", "views/x.py", False),
        ("def f():\n  from galore_jax.transforms import config", "codecs/x.py", False),
        ("from galore_jax.alias import galore", "describe.py", False),
        ("import galore_jax", "transforms/x.py", False),
        ("from galore_jax import galore", "transforms/x.py", False),
    ],
)
def test_the_rule_itself(line, path, fine):
    assert (list(violations(line, ROOT / path)) == []) == fine


def test_no_private_modules_of_others(module):
    private = [
        name
        for name in imports(ast.parse(module.read_text()))
        if any(part.startswith("_") and part != "__future__" for part in name.split("."))
        and name.split(".")[0] != "galore_jax"
    ]
    assert private == []


def test_no_flax_at_module_level(module):
    names = imports(at_module_level(ast.parse(module.read_text())))
    assert [name for name in names if name.split(".")[0] in ("flax", "orbax", "chex")] == []


def test_modules_are_small(module):
    assert len(module.read_text().splitlines()) <= 350


def test_only_declared_dependencies(module):
    allowed = {"galore_jax", "jax", "optax", "numpy", "flax", "chex", "jaxtyping", "__future__"}
    roots = {name.split(".")[0] for name in imports(ast.parse(module.read_text()))}
    assert roots - allowed - sys.stdlib_module_names == set()


def test_the_names_at_the_top_exist():
    assert len(set(galore_jax.__all__)) == len(galore_jax.__all__)
    assert all(hasattr(galore_jax, name) for name in galore_jax.__all__)
