"""Random trees, shapes, dtypes, ranks, axes and sides."""

from __future__ import annotations

import math

import conformance_cases as cc
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj

PROJECTORS = [
    (gj.projectors.svd(), gj.transport.keep()),
    (gj.projectors.gram_eigh(), gj.transport.reset()),
    (gj.projectors.randomized_svd(), gj.transport.align()),
    (gj.projectors.randomized_svd(oversample=2, warm_start=False), gj.transport.rotate()),
    (gj.projectors.subspace_iteration(), gj.transport.align()),
    (gj.projectors.random_orthonormal(), gj.transport.align()),
]
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5}
# How good a gradient is: noise, or something that a factorization has to survive.
KINDS = ["noise", "zero", "one entry", "rank one", "huge", "tiny", "equal"]


@st.composite
def leaves(draw):
    ndim = draw(st.integers(0, 4))
    shape = tuple(draw(st.integers(1, 6)) for _ in range(ndim))
    dtype = draw(st.sampled_from([*TOLERANCE, "float32", "int32"]))
    axes = None
    if ndim >= 2 and dtype != "int32":
        order = draw(st.permutations(range(ndim)))
        cut = draw(st.integers(1, ndim - 1))
        end = draw(st.integers(cut + 1, ndim))
        signs = [draw(st.sampled_from([0, ndim])) for _ in range(ndim)]
        named = [axis - sign for axis, sign in zip(order, signs, strict=True)]
        axes = gj.MatrixAxes(tuple(named[:cut]), tuple(named[cut:end]))
    return shape, dtype, axes, draw(st.sampled_from(KINDS))


problems = st.fixed_dictionaries(
    {
        "leaves": st.lists(leaves(), min_size=1, max_size=3),
        "rank": st.one_of(st.integers(1, 8), st.floats(0.05, 1.0)),
        "side": st.sampled_from(["short", "long", "input", "output"]),
        "method": st.sampled_from(PROJECTORS),
        "codec": st.sampled_from([gj.codecs.identity(), gj.codecs.cast("bfloat16")]),
        "refresh": st.sampled_from([gj.refresh.every(1), gj.refresh.staggered(2)]),
        "inner": st.sampled_from([optax.trace(0.9), optax.scale_by_lion()]),
        "nested": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)


def gradient(rng, shape, dtype, kind):
    if dtype == "int32":
        return rng.integers(-3, 4, size=shape)
    noise = rng.normal(size=shape)
    if kind == "zero":
        return np.zeros(shape)
    if kind == "equal":
        return np.ones(shape)
    if kind == "one entry":
        return np.where(np.arange(noise.size).reshape(shape) == 0, 1.0, 0.0)
    if kind == "rank one" and noise.ndim:
        flat = noise.reshape(shape[0], -1)
        return (flat[:, :1] * flat[:1]).reshape(shape)
    big = {"float16": 1e2, "bfloat16": 1e18, "float32": 1e18}[dtype]
    return noise * {"huge": big, "tiny": 1 / big}.get(kind, 1.0)


def matrices(leaf, axes, side):
    """``[number, kept, projected]`` and whether a basis can be smaller, by hand."""
    leaf = np.asarray(leaf, np.float64)
    reduction, output = (
        tuple(a % leaf.ndim for a in group) for group in (axes.reduction_axis, axes.output_axis)
    )
    rows, columns = (math.prod(leaf.shape[a] for a in g) for g in (reduction, output))
    takes_input = {
        "short": rows <= columns, "long": rows >= columns, "input": True, "output": False,
    }[side]  # fmt: skip
    projected, kept = (reduction, output) if takes_input else (output, reduction)
    batch = tuple(a for a in range(leaf.ndim) if a not in reduction + output)
    sizes = [math.prod(leaf.shape[a] for a in group) for group in (batch, kept, projected)]
    return leaf.transpose(batch + kept + projected).reshape(sizes)


def check(problem):
    rng = np.random.default_rng(problem["seed"])
    projector, transport = problem["method"]
    names = [f"w{i}" for i in range(len(problem["leaves"]))]

    def nest(values):
        flat = dict(zip(names, values, strict=True))
        return {"a": [flat, None], "b": ()} if problem["nested"] else flat

    def grads(kinds=True):
        return nest(
            jnp.asarray(gradient(rng, shape, dtype, kind if kinds else "noise"), dtype)
            for shape, dtype, _, kind in problem["leaves"]
        )

    tx = gj.low_rank_projection(
        problem["inner"], problem["rank"], projector=projector, transport=transport,
        refresh=problem["refresh"], side=problem["side"], codec=problem["codec"],
        axes=nest(axes for _, _, axes, _ in problem["leaves"]), targets=None,
    )  # fmt: skip
    state = tx.init(grads())
    first = cc.signature(state)
    step = cc.jit(tx.update)
    for kinds in (True, False):
        given = grads(kinds)
        update, state = step(given, state)
        assert cc.signature(state) == first
        assert cc.signature(update) == cc.signature(given)
        assert all(np.all(np.isfinite(np.asarray(x, np.float64))) for x in jax.tree.leaves(update))
        assert all(leaf.size > 0 for leaf in jax.tree.leaves(state))
        found = {path.rpartition("/")[2]: basis for path, basis in cc.bases(state).items()}
        by_name = {path.rpartition("/")[2]: leaf for path, leaf in cc.by_path(update).items()}
        for name, (_, dtype, axes, _) in zip(names, problem["leaves"], strict=True):
            if axes is None:
                assert name not in found
                continue
            rows = matrices(by_name[name], axes, problem["side"])
            _, kept, projected = rows.shape
            rank = problem["rank"]
            rank = max(1, round(rank * projected)) if isinstance(rank, float) else rank
            rank = min(rank, kept, projected)
            assert (name in found) == (rank < projected)
            if name not in found:
                continue
            basis = found[name]
            assert basis.shape == (rows.shape[0], projected, rank)
            gram = np.einsum("bpr,bps->brs", basis, basis)
            exact = problem["codec"] == gj.codecs.identity()
            assert np.max(np.abs(gram - np.eye(rank))) <= (1e-5 if exact else 2e-2)
            q, _ = np.linalg.qr(basis)
            outside = rows - rows @ q @ np.swapaxes(q, 1, 2)
            assert np.max(np.abs(outside)) <= TOLERANCE[dtype] * max(np.max(np.abs(rows)), 1e-30)


SETTINGS = {
    "deadline": None, "database": None,
    "suppress_health_check": list(hypothesis.HealthCheck), "print_blob": True,
}  # fmt: skip


@hypothesis.settings(max_examples=12, derandomize=True, **SETTINGS)
@hypothesis.given(problems)
def test_random_problems(problem):
    check(problem)


@pytest.mark.slow
@hypothesis.settings(max_examples=600, **SETTINGS)
@hypothesis.given(problems)
def test_many_random_problems(problem):
    check(problem)
