"""Eight simulated CPU devices, and no promotion that nobody asked for."""

import os
from importlib.metadata import version

# The suite compiles far more than it computes: LLVM need not optimise, and fusions may be emitted
# the old way, which takes half the time and which later versions do not know (HLO is the same).
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import collections
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_jax import projectors
from galore_jax.views import MatrixAxes
from galore_jax.views.matrix_view import matrix_view

# The examples may promote as they like, in docstrings too; the references compare optax with NumPy,
# and optax's Adam mixes dtypes.
LENIENT = {
    Path(__file__).parent / name for name in ("examples", "reference", "test_documentation.py")
}

# Every projector, with the options that take another path through it.
PROJECTORS = [
    projectors.svd(),
    projectors.gram_eigh(),
    projectors.randomized_svd(),
    projectors.randomized_svd(oversample=3, power_iters=2),
    projectors.randomized_svd(oversample=100, power_iters=0, warm_start=False),
    projectors.subspace_iteration(),
    projectors.random_orthonormal(),
]


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "sampled(n): of its cases only n run by default, spread evenly; the others are slow",
    )
    config.addinivalue_line(
        "markers",
        "standard_promotion: runs optax code that mixes dtypes (Adam's bias correction does)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks the cases that `sampled` leaves out as slow."""
    cases = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled"):
            cases[item.path, item.originalname].append(item)
    for table in cases.values():
        (wanted,) = table[0].get_closest_marker("sampled").args
        chosen = {i * len(table) // wanted for i in range(wanted)}
        for number, item in enumerate(table):
            if number not in chosen and len(table) > wanted:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs hold memory mappings, of which a process may have some 65,000."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """Mixed dtypes and silently broadcast ranks are errors."""
    lenient = LENIENT.intersection([request.node.path, *request.node.path.parents])
    if lenient or request.node.get_closest_marker("standard_promotion"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def relaxed():
    """`relaxed(inner)`: optax's transformation mixes dtypes as it likes, the lens may not."""

    def relaxed(inner):
        def update(updates, state, params=None):
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                return inner.update(updates, state, params)

        return optax.GradientTransformation(inner.init, update)

    return relaxed


@pytest.fixture(params=PROJECTORS, ids=repr)
def projector(request):
    return request.param


@pytest.fixture(scope="session")
def find_basis():
    """`find_basis(projector, matrix, rank, ...)`: the basis of one matrix `[kept, projected]`."""

    @functools.partial(jax.jit, static_argnames=("projector", "rank", "projects_input"))
    def find(projector, matrix, previous, refreshes, key, *, rank, projects_input):
        leaf, side = (matrix.T, "input") if projects_input else (matrix, "output")
        view = matrix_view(leaf.shape, MatrixAxes(), side)
        operator = projectors.dense_operator(leaf, view)
        return projector.basis(operator, rank, previous=previous, refreshes=refreshes, key=key)

    def find_basis(projector, matrix, rank, *, previous=None, seed=0, projects_input=True):
        matrix = jnp.asarray(matrix)
        dtype = jnp.float64 if matrix.dtype == jnp.float64 else jnp.float32
        start = jnp.eye(matrix.shape[1], rank, dtype=dtype) if previous is None else previous
        return find(
            projector,
            matrix,
            jnp.asarray(start, dtype),
            jnp.int32(previous is not None),
            np.random.default_rng(seed).integers(2**32, size=2, dtype=np.uint32),
            rank=rank,
            projects_input=projects_input,
        )

    return find_basis
