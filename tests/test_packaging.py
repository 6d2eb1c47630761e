"""What a wheel holds, and that the core needs nothing but its two dependencies."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import galore_jax

ROOT = Path(galore_jax.__file__).parent.parent

# Packages of the extras: none of them may be needed, or imported by the way.
EXTRAS = "chex", "equinox", "flax", "grain", "hypothesis", "matplotlib", "orbax", "rich", "tyro"
USE = f"""
import sys
import jax, jax.numpy as jnp, galore_jax as gj
tx = gj.galore_adamw(1e-2, rank=2)
params = {{"w": jnp.ones((16, 8))}}
updates, state = jax.jit(tx.update)(params, tx.init(params), params)
assert updates["w"].shape == (16, 8)
assert not {set(EXTRAS)} & set(sys.modules), set(sys.modules)
print(gj.__file__)
"""


def run(*command, cwd):
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_extras_are_not_imported(tmp_path):
    seen = run(sys.executable, "-c", USE, cwd=tmp_path)
    assert Path(seen.strip()).parent == ROOT / "galore_jax"


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", ".", str(ROOT), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "galore_jax").rglob("*.py")}
    assert modules | {"galore_jax/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {
        "galore_jax",
        f"galore_jax-{galore_jax.__version__}.dist-info",
    }
    run(sys.executable, "-m", "venv", "empty", cwd=tmp_path)
    python = str(tmp_path / "empty" / "bin" / "python")
    run(python, "-m", "pip", "install", str(wheel), cwd=tmp_path)
    assert "site-packages" in run(python, "-I", "-W", "error", "-c", USE, cwd=tmp_path)
