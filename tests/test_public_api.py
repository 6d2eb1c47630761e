"""The public names, and that each of them explains itself."""

import inspect

import pytest

import galore_jax as gj

TOP_LEVEL = {
    "STATIC_ARGS",
    "LowRankState",
    "MatrixAxes",
    "ProjectedGradient",
    "SubspaceMetrics",
    "accumulate",
    "all_matrices",
    "apply_if_finite",
    "apply_updates",
    "backward",
    "captured_energy",
    "codecs",
    "describe",
    "galore",
    "galore_adafactor",
    "galore_adamw",
    "galore_adamw8bit",
    "galore_lion",
    "galore_sgd",
    "init_sharded",
    "layerwise",
    "low_rank_projection",
    "matmul",
    "memory",
    "metrics",
    "projected_value_and_grad",
    "projectors",
    "q_galore_adamw8bit",
    "quant",
    "quantized_state",
    "recovery",
    "refresh",
    "scale_by_adam8bit",
    "scale_by_factored_rms",
    "state_sharding",
    "transport",
    "views",
}
SEAMS = {
    "projectors": {
        "gram_eigh",
        "random_orthonormal",
        "randomized_svd",
        "subspace_iteration",
        "svd",
    },
    "recovery": {"drop"},
    "refresh": {"adaptive", "every", "staggered"},
    "transport": {"align", "keep", "register_moment", "reset", "rotate"},
    "quant": {
        "DifferentiableWeight",
        "PowerArray",
        "QuantizedArray",
        "dequantize",
        "dequantize_params",
        "params_sharding",
        "quantize",
        "quantize_params",
        "value_and_grad",
    },
    "codecs": {"cast", "identity", "int4", "int8"},
    "layerwise": {"clip_by_previous_norm", "train_step"},
    "backward": {
        "ProjectedWeight",
        "dot_general",
        "einsum",
        "matmul",
        "projected_value_and_grad",
        "promote_dtype",
        "pullback",
    },
}
DOCUMENTED = [
    *(getattr(gj, name) for name in sorted(TOP_LEVEL) if callable(getattr(gj, name))),
    *(getattr(getattr(gj, seam), name) for seam, names in SEAMS.items() for name in sorted(names)),
]


def test_all_is_the_documented_list():
    assert set(gj.__all__) == TOP_LEVEL


@pytest.mark.parametrize("seam", SEAMS)
def test_seams_export_their_implementations(seam):
    assert set(getattr(gj, seam).__all__) >= SEAMS[seam]


@pytest.mark.parametrize("thing", DOCUMENTED, ids=lambda thing: thing.__name__)
def test_docstrings_have_an_example(thing):
    doc = inspect.getdoc(thing)
    assert doc is not None
    is_state = thing in (gj.LowRankState, gj.SubspaceMetrics)
    assert is_state or ">>>" in doc


@pytest.mark.parametrize(
    "value",
    [
        gj.projectors.randomized_svd(),
        gj.projectors.svd(),
        gj.refresh.every(3),
        gj.transport.rotate(b2=0.9),
        gj.codecs.cast("bfloat16"),
    ],
    ids=repr,
)
def test_values_are_static(value):
    # inject_hyperparams calls anything callable; jit hashes anything static.
    assert not callable(value)
    assert hash(value) == hash(
        eval(
            repr(value),
            vars(gj.projectors) | vars(gj.refresh) | vars(gj.transport) | vars(gj.codecs),
        )
    )
