"""At most one block's gradient exists: read off the compiled program."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
import stacked_model as sm

import galore_jax as gj
from galore_jax import layerwise

pytestmark = pytest.mark.standard_promotion

IN_PLACE = {"xla_cpu_copy_insertion_use_region_analysis": True}
WIDTH, HIDDEN = 64, 160  # a shape that nothing else has
TX = gj.galore_adamw(1e-2, rank=8, axes=gj.MatrixAxes(-2, -1), update_proj_gap=5)


def shapes(layers, quantized):
    """Matrices are much larger than activations."""

    def make():
        params = {
            "embed": {"embedding": jnp.zeros((8, WIDTH))},
            "blocks": {
                "norm": {"scale": jnp.ones((layers, WIDTH))},
                "up": {"kernel": jnp.zeros((layers, WIDTH, HIDDEN))},
                "down": {"kernel": jnp.zeros((layers, HIDDEN, WIDTH))},
            },
            "norm": {"scale": jnp.ones(WIDTH)},
            "lm_head": {"kernel": jnp.zeros((WIDTH, 8))},
        }
        return gj.quant.quantize_params(params) if quantized else params

    return jax.eval_shape(make)


@functools.cache
def compiled(kind, layers, quantized=False):
    step = {
        "ordinary": sm.ordinary_step(TX),
        "layerwise": layerwise.train_step(*sm.MODEL, TX),
        "clipped": layerwise.train_step(*sm.MODEL, TX, clip_norm=1.0),
    }[kind]
    params = shapes(layers, quantized)
    arguments = params, jax.eval_shape(TX.init, params), jax.ShapeDtypeStruct((1, 5), jnp.int32)
    with jax.numpy_dtype_promotion("standard"):
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments)
    return lowered.compile(compiler_options=IN_PLACE)


def computations(text):
    """The lines of every computation of an HLO module, by its name."""
    found, name = {}, None
    for line in text.splitlines():
        start = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if start:
            name = start[1]
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def creators(text, shape):
    """The operations that write an array of such a shape, other than into the place of another."""
    bodies = computations(text)
    fused = set(re.findall(r"fusion\(.*calls=%?([\w.\-]+)", text))
    seen = []
    for name, lines in bodies.items():
        if name in fused:
            continue  # what is inside a fusion has no buffer
        for line in lines:
            match = re.match(rf"\s*(?:ROOT )?%?[\w.\-]+ = f32\[{shape}\]\S* ([\w\-]+)\((.*)", line)
            if not match:
                continue
            operation, rest = match.groups()
            if operation == "fusion":
                (called,) = re.findall(r"calls=%?([\w.\-]+)", rest)
                (root,) = (x for x in bodies[called] if x.strip().startswith("ROOT"))
                operation = re.search(r"\]\S* ([\w\-]+)\(", root)[1]
            seen.append(operation)
    return set(seen)


@pytest.mark.parametrize("kind", ["layerwise", "clipped"])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.sampled(1)
def test_no_buffer_has_the_shape_of_the_stacked_gradient(kind, quantized):
    text = compiled(kind, 6, quantized).as_text()
    for shape in (f"6,{WIDTH},{HIDDEN}", f"6,{HIDDEN},{WIDTH}"):
        held = {"parameter", "get-tuple-element", "bitcast", "dynamic-update-slice"}
        assert creators(text, shape) <= held, shape
        if quantized:
            assert not creators(text, shape)  # the weights are codes, and decoded one by one


def test_an_ordinary_step_has_such_buffers():
    """The test above can fail."""
    text = compiled("ordinary", 6).as_text()
    made = creators(text, f"6,{WIDTH},{HIDDEN}")
    assert made - {"parameter", "get-tuple-element", "bitcast", "dynamic-update-slice"}


def test_temporaries_do_not_grow_with_the_number_of_layers():
    """But for the inputs of the blocks."""
    growth = {
        kind: compiled(kind, 16).memory_analysis().temp_size_in_bytes
        - compiled(kind, 6).memory_analysis().temp_size_in_bytes
        for kind in ("ordinary", "layerwise", "clipped")
    }
    gradients = 10 * 2 * WIDTH * HIDDEN * 4
    inputs = 10 * 4 * WIDTH * 4
    assert growth["ordinary"] > 0.9 * gradients
    for kind in ("layerwise", "clipped"):
        assert growth[kind] < 2 * inputs < 0.05 * gradients


def test_parameters_and_state_are_updated_in_their_buffers():
    analysis = compiled("layerwise", 6).memory_analysis()
    params = shapes(6, False)
    held = sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves((params, jax.eval_shape(TX.init, params)))
    )
    assert analysis.alias_size_in_bytes >= held
