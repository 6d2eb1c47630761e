"""Which arrays have the layer axis, and what cannot be cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stacked_model as sm

import galore_jax as gj
from galore_jax import layerwise
from galore_jax.layerwise.slices import Layer, block_leaves, layer_axes, num_layers

pytestmark = pytest.mark.standard_promotion

LENS = {"rank": 4, "axes": gj.MatrixAxes(-2, -1)}


def axes_of(tx, params):
    """Of parameters and state."""
    whole = Layer(params, jax.eval_shape(tx.init, params))
    return layer_axes(tx, whole, "blocks", block_leaves(params, "blocks"))


def axes_by_path(tx, params):
    paths, axes = sm.by_path(tx.init(params)), axes_of(tx, params).axes
    return dict(zip(paths, axes[-len(paths) :], strict=True))


@pytest.mark.parametrize("layers", [1, 4])
def test_the_state_of_the_blocks_has_the_axis_and_nothing_else(layers):
    params = sm.initial()
    params["blocks"] = jax.tree.map(lambda x: x[:layers], params["blocks"])
    tx = gj.galore_adamw8bit(
        optax.linear_schedule(1.0, 0.0, 5), update_proj_gap=gj.refresh.adaptive(5), **LENS
    )
    found = axes_by_path(tx, params)
    assert {axis for path, axis in found.items() if "blocks" not in path} == {None}
    inside = {path: axis for path, axis in found.items() if "blocks" in path}
    # The norms are not projected: no basis.
    assert {path for path, axis in inside.items() if axis is None} <= {
        path for path in inside if path.endswith("norm/scale")
    }
    assert {axis for path, axis in inside.items() if "kernel" in path} == {0}


def test_an_axis_elsewhere_is_found():
    """A transformation may keep its arrays as it likes."""
    tx = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), params),
        lambda updates, state, params=None: (updates, state),
    )
    found = axes_by_path(tx, sm.initial())
    assert found["blocks/up/kernel"] == 2 and found["blocks/norm/scale"] == 1


def test_a_slice_is_one_layer_and_goes_back_where_it_was():
    params = gj.quant.quantize_params(sm.initial(), block=16)
    tx = optax.sgd(1e-2)
    axes = axes_of(tx, params)
    params = Layer(params, tx.init(params))
    one, params = axes.slice(params, jnp.int32(2)).params, params.params
    kernel = one["blocks"]["up"]["kernel"]
    assert kernel.shape == (1, sm.WIDTH, sm.HIDDEN)
    np.testing.assert_array_equal(kernel.codes[0], params["blocks"]["up"]["kernel"].codes[2])
    assert one["lm_head"]["kernel"] is params["lm_head"]["kernel"]
    stacked = axes.stacked(Layer(params, tx.init(params)))
    zeros = [jnp.zeros_like(x) for x in axes.cut(stacked, 0)]
    for new, old in zip(axes.paste(stacked, zeros, jnp.int32(1)), stacked, strict=True):
        assert not np.any(new[1]) and np.any(old[1])
        np.testing.assert_array_equal(np.delete(new, 1, 0), np.delete(old, 1, 0))


def test_a_size_threshold_between_two_depths_does_not_matter():
    """Moments of 8 bits begin at some size, which one layer more may reach."""
    params = {"blocks": {"w": jnp.ones((4, 10, 10))}}
    tx = gj.scale_by_adam8bit(min_size=450)
    assert set(axes_by_path(tx, params).values()) == {0, None}


def test_blocks_of_codes_across_layers_are_refused():
    params = {"blocks": {"w": jnp.ones((32, 8))}}  # blocks run along the longer axis
    with pytest.raises(ValueError, match="blocks that run along the layer axis"):
        axes_of(gj.scale_by_adam8bit(min_size=1), params)
    stored = {"blocks": {"w": gj.quant.quantize(jnp.ones((32, 8)), axis=-2)}}
    with pytest.raises(ValueError, match=r"'blocks/w' of shape .* run along the layer axis"):
        num_layers(stored, "blocks")


@pytest.mark.parametrize(
    "params, message",
    [
        ([jnp.ones(3)], "must be a dict"),
        ({"layers": {}}, r"under 'blocks', got \['layers'\].*blocks="),
        ({"blocks": {}}, "no parameters under 'blocks'"),
        ({"blocks": {"w": jnp.ones(())}}, "'blocks/w' is a scalar"),
        (
            {"blocks": {"v": jnp.ones((2, 3)), "w": jnp.ones((3, 3))}},
            "'blocks/w' of shape .* has 3 layers, but 'blocks/v' has 2",
        ),
    ],
)
def test_parameters_that_are_no_stack(params, message):
    with pytest.raises(ValueError, match=message):
        num_layers(params, "blocks")


def test_integer_parameters_and_foreign_states_are_refused():
    tx, tokens = optax.adam(1e-3), sm.batches(1)[0]
    step, params = layerwise.train_step(*sm.MODEL, tx), sm.initial()
    with pytest.raises(TypeError, match="'steps_seen' has dtype int32"):
        odd = params | {"steps_seen": jnp.int32(0)}
        jax.eval_shape(step, odd, tx.init(odd), tokens)
    with pytest.raises(ValueError, match=r"not tx\.init\(params\)"):
        jax.eval_shape(step, params, optax.sgd(1e-3).init(params), tokens)
    with pytest.raises(ValueError, match=r"'0/mu/blocks/down/kernel'.*not tx\.init"):
        longer = jax.tree.map(lambda x: x, params)
        longer["blocks"] = jax.tree.map(lambda x: jnp.concatenate([x, x]), params["blocks"])
        jax.eval_shape(step, params, tx.init(longer), tokens)


def test_the_loss_is_a_scalar():
    tx = optax.sgd(1e-3)
    step = layerwise.train_step(sm.embed, sm.block, lambda p, x, tokens: x, tx)
    with pytest.raises(ValueError, match="scalar loss"):
        jax.eval_shape(step, sm.initial(), tx.init(sm.initial()), sm.batches(1)[0])
