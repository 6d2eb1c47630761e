"""Updates outside of `jax.jit`: nothing is compiled anew once every kind of step has been seen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj

pytestmark = pytest.mark.standard_promotion

SHAPES = {"w": (12, 16), "stack": (3, 12, 8), "bias": (16,)}
GAP, STEPS = 3, 7


def trees(count):
    rng = np.random.default_rng(0)
    return [
        {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in SHAPES.items()}
        for _ in range(count)
    ]


def adamw(**options):
    return gj.galore_adamw(1e-2, 4, update_proj_gap=GAP, axes=gj.MatrixAxes(), **options)


CODES = {"min_size": 2, "block": 8}
CASES = {
    **{
        str(projector): lambda projector=projector: adamw(projector=projector)
        for projector in (
            gj.projectors.svd(), gj.projectors.gram_eigh(), gj.projectors.randomized_svd(),
            gj.projectors.subspace_iteration(), gj.projectors.random_orthonormal(),
        )
    },
    **{
        str(transport): lambda transport=transport: adamw(
            projector=gj.projectors.svd(), transport=transport
        )
        for transport in (
            gj.transport.keep(), gj.transport.reset(), gj.transport.reset(second="mean"),
            gj.transport.rotate(),
        )
    },
    "adaptive": lambda: gj.low_rank_projection(
        optax.scale_by_adam(), 4, refresh=gj.refresh.adaptive(GAP), axes=gj.MatrixAxes()
    ),
    "8 bits": lambda: gj.low_rank_projection(
        gj.quantized_state(optax.scale_by_adam(), **CODES), 4, refresh=GAP, axes=gj.MatrixAxes()
    ),
    "bases in 4 bits": lambda: adamw(codec=gj.codecs.int4(8)),
    "adafactor": lambda: gj.galore_adafactor(
        1e-2, 4, update_proj_gap=GAP, axes=gj.MatrixAxes()
    ),
    "windows": lambda: gj.accumulate(adamw(), 2),
    "guarded": lambda: gj.apply_if_finite(adamw(), 2),
    "guarded windows": lambda: gj.apply_if_finite(gj.accumulate(adamw(), 2), 2),
}  # fmt: skip


@pytest.fixture
def compiled():
    """Names of what has been lowered or compiled since the last look."""
    seen = []

    def listen(event, duration, **_):
        del duration
        if event.endswith(("backend_compile_duration", "jaxpr_to_mlir_module_duration")):
            seen.append(event)

    def look():
        found = list(seen)
        seen.clear()
        return found

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield look
    jax.monitoring.unregister_event_duration_listener(listen)


def run(tx, compiled, arriving=lambda gradients, state: gradients):
    params, *gradients = trees(STEPS + 1)
    state, counts = tx.init(params), []
    for gradient in gradients:
        gradient = arriving(gradient, state)
        compiled()
        _, state = tx.update(gradient, state, params)
        counts.append(len(compiled()))
    return counts


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_compiled_anew(name, compiled):
    counts = run(CASES[name](), compiled)
    assert counts[0] > 0
    assert counts[2:] == [0] * (STEPS - 2)  # a window of two ends in the second call


def test_nothing_is_compiled_anew_for_projected_gradients(compiled):
    tx = adamw()

    def arriving(gradients, state):
        lens = state[0]
        plans = gj.views.leaf_plan(lens.config, gradients)
        return {
            plan.path: gj.ProjectedGradient(
                plan.view.project(gradients[plan.path], lens.projectors[plan.path]),
                lens.projectors[plan.path],
            )
            if plan.view
            else gradients[plan.path]
            for plan in plans
        }

    assert run(tx, compiled, arriving)[2:] == [0] * (STEPS - 2)


def test_an_extra_argument_may_be_a_function():
    tx = gj.apply_if_finite(
        optax.chain(adamw(), optax.scale_by_backtracking_linesearch(3)), 2
    )  # fmt: skip
    params, gradients = trees(2)

    def loss(p):
        return optax.tree.norm(p, squared=True)

    updates, _ = tx.update(
        gradients, tx.init(params), params, value=loss(params), grad=gradients, value_fn=loss
    )
    assert jax.tree.map(jnp.shape, updates) == SHAPES
