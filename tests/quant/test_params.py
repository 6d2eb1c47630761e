"""Whole trees of weights, in codes and back."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_jax as gj
from galore_jax.quant import (
    QuantizedArray,
    dequantize,
    dequantize_params,
    params_sharding,
    quantize,
    quantize_params,
)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


PARAMS = {
    "embed": {"embedding": normal(12, 8)},
    "layers": {
        "attention": {"q": normal(2, 8, 8), "bias": normal(2, 8)},
        "norm": {"scale": normal(2, 8)},
        "up": {"kernel": normal(8, 20, dtype=jnp.bfloat16), "bias": normal(20)},
    },
    "lm_head": normal(8, 12),
    "position": jnp.arange(6).reshape(2, 3),
    "temperature": 0.5,
}
WEIGHTS = {"layers/attention/q", "layers/up/kernel"}


def chosen(tree):
    with_path, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, QuantizedArray)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in with_path
        if isinstance(leaf, QuantizedArray)
    }


def test_default_targets():
    """Embeddings, head, norms and biases stay; so does what is no floating matrix."""
    quantized = quantize_params(PARAMS)
    assert chosen(quantized) == WEIGHTS
    assert quantized["embed"]["embedding"] is PARAMS["embed"]["embedding"]
    assert quantized["lm_head"] is PARAMS["lm_head"]
    assert quantized["position"] is PARAMS["position"]
    assert quantized["temperature"] == 0.5
    kernel = quantized["layers"]["up"]["kernel"]
    assert (kernel.bits, kernel.block, kernel.dtype) == (8, 256, jnp.bfloat16)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("kernel|q$", WEIGHTS),
        ("embed", {"embed/embedding"}),
        ("nothing", set()),
        (lambda path, leaf: leaf.shape[-1] == 12, {"lm_head"}),
        # A norm with a matrix' shape is taken if it is asked for.
        ("norm", {"layers/norm/scale"}),
    ],
)
def test_targets(targets, expected):
    assert chosen(quantize_params(PARAMS, targets=targets)) == expected


def test_all_matrices():
    floating = {name: leaf for name, leaf in PARAMS.items() if name != "position"}
    assert chosen(quantize_params(floating, targets=gj.all_matrices)) == {
        *WEIGHTS,
        "embed/embedding",
        "lm_head",
        "layers/attention/bias",
        "layers/norm/scale",
    }


@pytest.mark.parametrize("targets", ["position", gj.all_matrices])
def test_an_integer_leaf_that_was_asked_for(targets):
    with pytest.raises(TypeError, match=r"'position'.*int32.*floating"):
        quantize_params(PARAMS, targets=targets)


@pytest.mark.parametrize(
    ("error", "options", "pattern"),
    [
        (ValueError, {"bits": 3}, "`bits`.*3"),
        (ValueError, {"block": 0}, "`block`.*0"),
        (TypeError, {"block": 1.5}, "`block`.*1.5"),
        (TypeError, {"targets": 3}, "`targets`.*3"),
        (ValueError, {"targets": "("}, "`targets`.*regex"),
    ],
)
def test_errors_come_before_any_leaf(error, options, pattern):
    with pytest.raises(error, match=pattern):
        quantize_params({}, **options)


@pytest.mark.parametrize("bits", [8, 4])
def test_round_trip(bits):
    quantized = quantize_params(PARAMS, bits=bits, block=8)
    restored = dequantize_params(quantized)
    assert jax.tree.structure(restored) == jax.tree.structure(PARAMS)
    for path, old in jax.tree_util.tree_flatten_with_path(PARAMS)[0]:
        new = restored
        for part in path:
            new = new[part.key]
        if jax.tree_util.keystr(path, simple=True, separator="/") not in WEIGHTS:
            assert new is old
            continue
        assert new.shape == old.shape and new.dtype == old.dtype
        old = np.asarray(old.astype(jnp.float32))
        error = np.abs(np.asarray(new.astype(jnp.float32)) - old)
        assert 0 < np.max(error) <= np.ptp(old) / (2**bits - 1) / 2 * 1.01 + 0.01


def test_what_is_quantized_already():
    """Once more at the same width it stays as it is; at another one it is converted."""
    once = quantize_params(PARAMS, block=8)
    twice = quantize_params(once, block=8)
    assert jax.tree.structure(twice) == jax.tree.structure(once)
    q = "layers", "attention", "q"
    one, two = once[q[0]][q[1]][q[2]], twice[q[0]][q[1]][q[2]]
    for part in ("codes", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(one, part), getattr(two, part))
    narrow = quantize_params(once, bits=4, block=4)
    assert chosen(narrow) == WEIGHTS
    narrow = narrow[q[0]][q[1]][q[2]]
    assert (narrow.bits, narrow.block, narrow.shape) == (4, 4, (2, 8, 8))
    np.testing.assert_allclose(dequantize(narrow), dequantize(one), atol=0.3)


def test_abstract():
    shapes = jax.eval_shape(quantize_params, jax.eval_shape(lambda: PARAMS))
    assert chosen(shapes) == WEIGHTS
    restored = jax.eval_shape(dequantize_params, shapes)
    assert restored["layers"]["up"]["kernel"] == jax.ShapeDtypeStruct((8, 20), jnp.bfloat16)


def test_other_leaves_are_left_alone_by_dequantize():
    tree = {"a": normal(3, 4), "b": None, "c": [1.5, jnp.arange(3)]}
    restored = dequantize_params(tree)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    assert restored["a"] is tree["a"] and restored["c"][1] is tree["c"][1]


SHAPES = {"embed": (16, 8), "stack": (8, 16, 24), "up": (32, 48), "norm": (8,)}
SPECS = {  # the mesh is 4x2
    "none": {name: P() for name in SHAPES},
    "first": {name: P("data") for name in SHAPES},
    "last": {name: P(*(None,) * (len(shape) - 1), "model") for name, shape in SHAPES.items()},
    "middle": {name: P(None, "data") if len(shape) > 2 else P() for name, shape in SHAPES.items()},
    "two": {name: P("model", "data") if len(shape) > 1 else P() for name, shape in SHAPES.items()},
    "together": {name: P(("data", "model")) for name in SHAPES},
    "last, together": {
        name: P(*(None,) * (len(shape) - 1), ("model", "data")) for name, shape in SHAPES.items()
    },
}


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def expected_spec(spec, part_shape, mesh):
    """Axis by axis, the first of all, all but the last, ... none that divides."""
    entries = []
    for axis, entry in enumerate(spec):
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        fewer = [names[:count] for count in range(len(names), -1, -1)]
        sizes = [int(np.prod([mesh.shape[name] for name in some])) for some in fewer]
        fits = next(f for f, size in zip(fewer, sizes, strict=True) if part_shape[axis] % size == 0)
        entries.append(fits if len(fits) > 1 else fits[0] if fits else None)
    return P(*entries)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("bits, block", [(8, 8), (4, 6), (8, 256)])
@pytest.mark.sampled(2)
def test_codes_are_made_in_shards(bits, block, kind):
    """All specs in one program."""
    mesh = mesh_of(kind)
    per_leaf = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    params = {specs: {name: normal(*SHAPES[name]) for name in SHAPES} for specs in SPECS}
    quantize_all = functools.partial(quantize_params, bits=bits, block=block)
    abstract = jax.eval_shape(quantize_all, params)
    shardings = params_sharding(abstract, per_leaf)
    assert jax.tree.structure(shardings) == jax.tree.structure(abstract)
    for specs, named in shardings.items():
        assert all(named[name] is per_leaf[specs][name] for name in ("embed", "norm"))
        for name in ("stack", "up"):
            for part in ("codes", "scales", "zeros"):
                shape = getattr(abstract[specs][name], part).shape
                spec = expected_spec(SPECS[specs][name], shape, mesh)
                assert getattr(named[name], part) == NamedSharding(mesh, spec), (specs, name, part)
    make = jax.jit(quantize_all, out_shardings=shardings)
    made, alone = make(jax.device_put(params, per_leaf)), jax.jit(quantize_all)(params)
    for array, other, sharding in zip(*map(jax.tree.leaves, (made, alone, shardings)), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
        np.testing.assert_array_equal(jax.device_get(array), other)
    assert params_sharding(made, per_leaf) == shardings  # of arrays as of their shapes


def test_blocks_along_the_axis_before_the_last():
    mesh = mesh_of()
    stored = {"w": quantize(normal(16, 24), bits=4, block=8, axis=-2)}  # codes (8, 24)
    both = {"w": NamedSharding(mesh, P("data", "model"))}
    parts = params_sharding(stored, both)["w"]
    assert parts.codes.spec == P("data", "model")
    assert parts.scales.spec == P(None, "model")  # two blocks for four shards
    placed = jax.device_put(stored, {"w": parts})
    np.testing.assert_array_equal(jax.device_get(dequantize(placed["w"])), dequantize(stored["w"]))


def test_shardings_of_parts_serve_as_those_of_leaves():
    """What comes out can go in again, and into `state_sharding`."""
    mesh = mesh_of()
    params = quantize_params({name: normal(*shape) for name, shape in SHAPES.items()}, block=8)
    per_leaf = {name: NamedSharding(mesh, spec) for name, spec in SPECS["two"].items()}
    shardings = params_sharding(params, per_leaf)
    assert params_sharding(params, shardings) == shardings
    tx = gj.galore_sgd(1e-2, 4, axes=gj.MatrixAxes())
    assert gj.state_sharding(tx, params, shardings) == gj.state_sharding(tx, params, per_leaf)


def test_shardings_keep_boxes_and_the_memory_they_name():
    host = NamedSharding(mesh_of(), P("data"), memory_kind="pinned_host")
    boxed = {"w": nn.Partitioned(quantize(normal(16, 24), block=8), ("data", None))}
    parts = params_sharding(boxed, {"w": host})
    assert jax.tree.structure(parts) == jax.tree.structure(boxed)
    assert {part.memory_kind for part in jax.tree.leaves(parts)} == {"pinned_host"}


def test_a_leaf_in_codes_that_the_mesh_does_not_divide():
    mesh = mesh_of()
    params = {"w": quantize(normal(16, 22))}
    with pytest.raises(ValueError, match=r"'w' of shape \(16, 22\): axis 1 has 22.*'data'.*4"):
        params_sharding(params, {"w": NamedSharding(mesh, P(None, "data"))})
    with pytest.raises(TypeError, match=r"'w'.*PartitionSpec|'w'.*P\("):
        params_sharding(params, {"w": P("data")})
    with pytest.raises(ValueError, match=r"no sharding for 'w'; no parameter for 'v'"):
        params_sharding(params, {"v": NamedSharding(mesh, P())})
