"""Both levers at once: one block at a time, and not even its gradient."""

import jax
import jax.numpy as jnp
import optax
import pytest
import stacked_model as sm

import galore_jax as gj
from galore_jax import backward, layerwise

pytestmark = pytest.mark.standard_promotion

LENS = {"rank": 4, "axes": gj.MatrixAxes(-2, -1), "update_proj_gap": 4}
SGD = gj.galore_sgd(1e-1, momentum=0.9, **LENS)


def projected_step(tx, loss_fn=sm.loss_fn):
    """An ordinary step with projected gradients."""
    value_and_grad = backward.projected_value_and_grad(loss_fn, tx)

    def step(params, opt_state, batch, key=None):
        loss, gradients = value_and_grad(params, opt_state, batch)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return gj.apply_updates(params, updates, key=key), opt_state, loss

    return step


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.sampled(1)
def test_the_same_as_all_projected_gradients_at_once(weights):
    params = sm.initial()
    state, data, key = SGD.init(params), sm.batches(9), jax.random.key(0)
    if weights == "int8":
        params = gj.quant.quantize_params(params, block=16)
    expected, expected_state, _ = sm.run(projected_step(SGD), params, state, data, key)
    step = layerwise.train_step(*sm.MODEL, SGD)
    found, found_state, _ = sm.run(step, params, state, data, key)
    decoded = [gj.quant.dequantize_params(tree) for tree in (found, expected)]
    assert sm.distance(*decoded) < (1e-3 if weights == "int8" else 1e-5)
    assert sm.signature(found_state) == sm.signature(expected_state)


def test_weights_outside_the_blocks_may_be_projected_too():
    """One that only the embedding multiplies by, and one that only the head does."""

    def embed(params, tokens):
        rows = jax.nn.one_hot(tokens[:, :-1], sm.VOCAB, dtype=jnp.float32)
        return gj.matmul(rows, params["embed"]["embedding"])

    def loss(params, tokens):
        x, _ = jax.lax.scan(
            lambda x, layer: (sm.block(layer, x), None), embed(params, tokens), params["blocks"]
        )
        return sm.head(params, x, tokens)

    tx = gj.galore_sgd(1e-1, momentum=0.9, targets="kernel|embedding", **LENS)
    params, data = sm.initial(), sm.batches(9)
    state = tx.init(params)
    assert {"embed/embedding", "lm_head/kernel"} < gj.metrics(state).keys()
    expected, expected_state, _ = sm.run(projected_step(tx, loss), params, state, data)
    step = layerwise.train_step(embed, sm.block, sm.head, tx)
    found, found_state, _ = sm.run(step, params, state, data)
    assert sm.distance(found, expected) < 1e-5
    for path, seen in gj.metrics(found_state).items():
        assert (seen.refreshes == gj.metrics(expected_state)[path].refreshes).all(), path
        assert (seen.refreshes == 3).all(), path


def test_a_projected_leaf_that_embedding_and_head_share_is_refused():
    """Each would find a basis of its own for it; formed gradients may be added up."""

    def embed(params, tokens):
        return params["embed"]["embedding"].astype(jnp.float32)[tokens[:, :-1]]

    def head(params, x, tokens):
        kernel = params["embed"]["embedding"].astype(jnp.float32).T
        return sm.head({**params, "lm_head": {"kernel": kernel}}, x, tokens)

    params = sm.initial()
    del params["lm_head"]
    tx = gj.galore_sgd(1e-1, targets="kernel|embedding", **LENS)
    step = layerwise.train_step(embed, sm.block, head, tx)
    with pytest.raises(
        ValueError, match=r"leaf 'embed/embedding' .*`embed` and by `head`.*targets"
    ):
        jax.eval_shape(step, params, tx.init(params), sm.batches(1)[0])
    apart = sm.initial()
    _, _, metrics = jax.jit(layerwise.train_step(embed, sm.block, sm.head, tx))(
        apart, tx.init(apart), sm.batches(1)[0]
    )
    assert metrics.skipped == 0
    step = layerwise.train_step(embed, sm.block, head, tx, pullback=sm.plain)
    _, _, metrics = jax.jit(step)(params, tx.init(params), sm.batches(1)[0])
    assert metrics.skipped == 0


def test_the_norm_that_clips_is_that_of_the_projections():
    chained = optax.chain(optax.clip_by_global_norm(0.2), SGD)
    params, data = sm.initial(), sm.batches(9)
    expected, _, _ = sm.run(projected_step(chained), params, chained.init(params), data)
    step = layerwise.train_step(*sm.MODEL, SGD, clip_norm=0.2)
    found, _, _ = sm.run(step, params, SGD.init(params), data)
    assert sm.distance(found, expected) < 1e-5


def test_nothing_has_the_shape_of_a_gradient():
    """Not in the whole program, backward pass and refresh included."""
    codes = jax.eval_shape(gj.quant.quantize_params, sm.initial())
    state = jax.eval_shape(SGD.init, sm.initial())
    products = {}
    for name, pullback in sm.PULLBACKS.items():
        step = layerwise.train_step(*sm.MODEL, SGD, **pullback)
        jaxpr = jax.make_jaxpr(step)(codes, state, jax.ShapeDtypeStruct((4, 17), jnp.int32))
        products[name] = {
            tuple(eqn.outvars[0].aval.shape)
            for eqn in equations(jaxpr.jaxpr)
            if eqn.primitive.name == "dot_general"
        }
    gradients = {(sm.WIDTH, sm.HIDDEN), (sm.HIDDEN, sm.WIDTH)}
    assert gradients & products["full"]
    # What has that shape is the lifted update, which keeps the axis of the layer.
    assert not gradients & products["projected"]


def equations(jaxpr):
    """All equations, however deep."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)
