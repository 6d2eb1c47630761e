"""The table: every kind of transformation on one tree that holds every kind of leaf."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_jax as gj

STEPS = 7
GAP = 3
LEARNING_RATE = 0.1
# Tests compile far longer than they run.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Path -> (shape, axes of the reduction side, axes of the output side); all others are batch axes.
# Every matrix has a short side of at least 5, so that rank 3 is below full rank on all of them.
MATRICES = {
    "dense/square": ((8, 8), (0,), (1,)),
    "dense/tall": ((12, 7), (0,), (1,)),
    "dense/wide": ((6, 10), (0,), (1,)),
    "heads/query": ((10, 2, 4), (0,), (1, 2)),
    "layers/kernel": ((3, 9, 5), (1,), (2,)),
}
AXES = {
    "heads/query": gj.MatrixAxes(0, (1, 2)),
    "layers": gj.MatrixAxes(-2, -1),
}
AT_FULL_SIZE = {
    "embed": (11, 6),
    "dense/bias": (7,),
    "layers/norm_scale": (3, 9),
    "temperature": (),
}
INTEGER = "steps_seen"


@dataclasses.dataclass(frozen=True)
class Case:
    """One transformation; `lens` options are repeated here for the tests to compute with."""

    name: str
    make: Callable[[], optax.GradientTransformationExtraArgs]
    side: str = "short"
    basis_tolerance: float = 1e-5

    @property
    def integers(self) -> bool:
        """Whether its tree has an integer leaf: optax's own steps behind a lens multiply it."""
        return not self.is_alias

    @property
    def is_alias(self) -> bool:
        return self.name.startswith("galore")

    @property
    def promotion(self) -> Any:
        """Strict, but for the aliases: they have optax's Adam inside, see `relaxed`."""
        return jax.numpy_dtype_promotion("standard" if self.is_alias else "strict")

    def __str__(self):
        return self.name


def _lens(inner: optax.GradientTransformation, rank: Any = 3, **options: Any):
    options = {"refresh": GAP, "axes": AXES} | options
    return lambda: gj.low_rank_projection(inner, rank, **options)


def _alias(alias: Callable, rank: Any = 3, **options: Any):
    options = {"update_proj_gap": GAP, "axes": AXES} | options
    return lambda: alias(LEARNING_RATE, rank, **options)


def rank_by_path(path: str, leaf: Any) -> int | float | None:
    if path == "dense/square":
        return None
    return 0.5 if "heads" in path else min(leaf.shape[-2:]) - 1


def falling(count: jax.Array) -> jax.Array:
    return 0.5 / (1.0 + count.astype(jnp.float32))


def relaxed(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` with ordinary promotion: optax corrects Adam's bias by float ** int32."""
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra_args):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


_adam = relaxed(optax.scale_by_adam())
_adam8bit = gj.quantized_state(_adam, min_size=2, block=8)  # all moments but of scalars
_exact = {"projector": gj.projectors.svd()}

CASES = (
    Case("galore", _alias(gj.galore)),
    Case("galore_adamw", _alias(gj.galore_adamw)),
    Case("galore_lion", _alias(gj.galore_lion)),
    Case("galore_sgd", _alias(gj.galore_sgd)),
    Case("galore_sgd-momentum", _alias(gj.galore_sgd, momentum=0.9, nesterov=True)),
    Case("galore_adafactor", _alias(gj.galore_adafactor)),
    # These leaves are below its least size: bases in bf16, moments in fp32.
    Case("galore_adamw8bit", _alias(gj.galore_adamw8bit), basis_tolerance=1e-2),
    Case("align-svd-long", _lens(_adam, side="long", **_exact), side="long"),
    Case("keep-svd-input", _lens(_adam, side="input", transport=gj.transport.keep(), **_exact),
         side="input"),
    Case("keep-gram_eigh-output", _lens(
        relaxed(optax.scale_by_amsgrad()), side="output", projector=gj.projectors.gram_eigh(),
        transport=gj.transport.keep()), side="output"),
    Case("reset-subspace", _lens(
        _adam, projector=gj.projectors.subspace_iteration(), transport=gj.transport.reset())),
    Case("reset_mean-random-long", _lens(
        optax.chain(optax.scale_by_rms(), optax.trace(0.9)), side="long",
        projector=gj.projectors.random_orthonormal(),
        transport=gj.transport.reset(second="mean")), side="long"),
    Case("rotate-randomized", _lens(
        _adam, projector=gj.projectors.randomized_svd(oversample=2, power_iters=2),
        transport=gj.transport.rotate())),
    Case("rotate-gram_eigh-lion-output", _lens(
        optax.scale_by_lion(), side="output", projector=gj.projectors.gram_eigh(),
        transport=gj.transport.rotate(b2=0.99)), side="output"),
    Case("cold-input", _lens(
        _adam, side="input", projector=gj.projectors.randomized_svd(warm_start=False)),
        side="input"),
    Case("staggered-align", _lens(_adam, refresh=gj.refresh.staggered(GAP))),
    Case("staggered-rotate-bf16", _lens(
        _adam, refresh=gj.refresh.staggered(5), transport=gj.transport.rotate(),
        codec=gj.codecs.cast("bfloat16")), basis_tolerance=1e-2),
    Case("bf16-long", _lens(_adam, side="long", codec=gj.codecs.cast(jnp.bfloat16)), side="long",
         basis_tolerance=1e-2),
    Case("rank-float", _lens(_adam, 0.4, scale=falling)),
    Case("rank-callable", _lens(_adam, rank_by_path)),
    Case("unknown-inner", _lens(optax.scale_by_adadelta())),
    Case("align-adam8bit", _lens(_adam8bit, **_exact)),
    Case("rotate-adam8bit", _lens(_adam8bit, transport=gj.transport.rotate(), **_exact)),
    # A gap beyond the run: when adaptive refreshes is the business of tests/refresh, and the law
    # for what is not `every` counts the equal shares of `staggered`.
    Case("adaptive-lion8bit-input", _lens(
        gj.quantized_state(optax.scale_by_lion(), min_size=2, block=8), side="input",
        refresh=gj.refresh.adaptive(STEPS + 1), transport=gj.transport.reset()), side="input"),
)  # fmt: skip

# Bases that are stored as codes. Not in the table, because a basis is a node of several arrays
# there, and one of its laws wants trees with one array at every leaf; the others hold, with an
# orthonormality of 4 bits only (an entry of 8 may be off by a fifteenth of the block's range).
QUANTIZED_BASES = (
    Case("q_galore", _lens(
        _adam8bit, codec=gj.codecs.int4(block=8), refresh=gj.refresh.adaptive(1, patience=2)),
        basis_tolerance=0.35),
    Case("int8-rotate-adam8bit", _lens(
        _adam8bit, codec=gj.codecs.int8(block=8), transport=gj.transport.rotate(), **_exact),
        basis_tolerance=2e-2),
)  # fmt: skip


def path_of(path: Any) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves by path, as the test sees them; not by the library's own path rule."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def tree(seed: int = 0, dtype: Any = jnp.float32, integers: bool = True) -> dict[str, Any]:
    """A parameter or gradient tree with every kind of leaf."""
    rng = np.random.default_rng(seed)
    shapes = {path: shape for path, (shape, *_) in MATRICES.items()} | AT_FULL_SIZE
    flat = {path: jnp.asarray(rng.normal(size=shape), dtype) for path, shape in shapes.items()}
    flat |= {INTEGER: jnp.asarray(seed + 7, jnp.int32) if integers else None, "dense/none": None}
    return _nest(flat)


@functools.cache
def gradients(integers: bool = True) -> list[Any]:
    return [tree(seed=100 + step, integers=integers) for step in range(STEPS)]


def projected_side(path: str, side: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(kept axes, projected axes), decided here once more from the documented rule."""
    shape, reduction, output = MATRICES[path]
    rows, columns = (math.prod(shape[axis] for axis in axes) for axes in (reduction, output))
    takes_input = {
        "short": rows <= columns, "long": rows >= columns, "input": True, "output": False,
    }[side]  # fmt: skip
    return (output, reduction) if takes_input else (reduction, output)


def as_matrices(path: str, leaf: Any, side: str) -> np.ndarray:
    """``[number of matrices, kept, projected]``, with NumPy transposes only."""
    kept, projected = projected_side(path, side)
    leaf = np.asarray(leaf, np.float64)
    batch = [axis for axis in range(leaf.ndim) if axis not in kept + projected]
    sizes = [math.prod(leaf.shape[axis] for axis in axes) for axes in (batch, kept, projected)]
    return leaf.transpose(*batch, *kept, *projected).reshape(sizes)


def lenses(state: Any) -> list[gj.LowRankState]:
    def is_lens(node: Any) -> bool:
        return isinstance(node, gj.LowRankState)

    return [node for node in jax.tree.leaves(state, is_leaf=is_lens) if is_lens(node)]


def projecting_lens(state: Any) -> gj.LowRankState:
    """The one lens with bases; `galore_adafactor` has another for the leaves at full size."""
    (lens,) = (s for s in lenses(state) if any(p.ndim for p in jax.tree.leaves(s.projectors)))
    return lens


def bases(state: Any) -> dict[str, np.ndarray]:
    """Bases by path, ``[number of matrices, projected, rank]``, float64."""
    return {
        path: np.asarray(basis.astype(jnp.float32), np.float64).reshape(-1, *basis.shape[-2:])
        for lens in lenses(state)  # under `partition` there are several, with leaves of their own
        for path, basis in by_path(_decoded(lens.projectors)).items()
        if basis.ndim > 0
    }


def _decoded(stored: Any) -> Any:
    """Arrays, also where bases are stored as codes."""
    return jax.tree.map(
        gj.quant.dequantize, stored, is_leaf=lambda x: isinstance(x, gj.quant.QuantizedArray)
    )


def signature(tree: Any) -> Any:
    """Structure, static parts, shapes and dtypes, and weak types: what must not change."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(leaf.shape, leaf.dtype, jax.typeof(leaf).weak_type) for leaf in leaves]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a transformation did in `STEPS` jitted steps."""

    params: Any
    states: list[Any]  # one more than updates
    updates: list[Any]
    step: Callable  # jitted (grads, state, params) -> (update, state)
    traces: int


@functools.cache
def run(case: Case) -> Run:
    """The trajectory of a case; computed once, looked at by many tests."""
    tx, traces = case.make(), []

    @jit
    def step(grads: Any, state: Any, params: Any):
        traces.append(None)
        return tx.update(grads, state, params)

    params = tree(integers=case.integers)
    states, updates = [tx.init(params)], []
    for grads in gradients(case.integers):
        with case.promotion:
            update, state = step(grads, states[-1], params)
        states.append(state)
        updates.append(update)
    return Run(params, states, updates, step, len(traces))
