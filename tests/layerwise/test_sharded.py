"""On eight devices, what one device computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stacked_model as sm
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_jax as gj
from galore_jax import layerwise

pytestmark = pytest.mark.standard_promotion

LENS = {"rank": 4, "axes": gj.MatrixAxes(-2, -1), "update_proj_gap": 4}
TX = gj.galore_adamw(1e-2, weight_decay=0.1, **LENS)


def shardings(mesh):
    def fsdp(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "kernel" not in name and "embedding" not in name:
            return NamedSharding(mesh, P())
        # The larger of the matrix' axes is divided, never the layers.
        axis = int(np.argmax(leaf.shape[-2:])) + leaf.ndim - 2
        return NamedSharding(mesh, P(*(("data" if i == axis else None) for i in range(leaf.ndim))))

    return jax.tree_util.tree_map_with_path(fsdp, sm.initial())


@pytest.mark.parametrize("clip_norm", [None, 0.3])
@pytest.mark.sampled(1)
def test_fully_sharded_equals_one_device(clip_norm):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    step = layerwise.train_step(*sm.MODEL, TX, clip_norm=clip_norm)
    data = [jnp.tile(tokens, (2, 1)) for tokens in sm.batches(10)]
    expected, _, losses = sm.run(step, sm.initial(), TX.init(sm.initial()), data)

    sharding = shardings(mesh)
    params = jax.device_put(sm.initial(), sharding)
    state = gj.init_sharded(TX, params, sharding)
    states = gj.state_sharding(TX, params, sharding)
    sharded_step = jax.jit(
        step, donate_argnums=(0, 1), out_shardings=(sharding, states, NamedSharding(mesh, P()))
    )
    found = []
    for tokens in data:
        tokens = jax.device_put(tokens, NamedSharding(mesh, P("data")))
        params, state, metrics = sharded_step(params, state, tokens)
        found.append(float(metrics.loss))
    assert sharded_step._cache_size() == 1
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert sm.distance(jax.device_get(params), expected) < 1e-5
    kernel = params["blocks"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (sm.LAYERS, sm.WIDTH, sm.HIDDEN // 8)


def test_on_a_mesh_with_explicit_axes():
    """The model gathers its weights where it uses them; the step says nothing about shardings."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))

    def gathered(tree):
        return jax.tree.map(lambda x: jax.sharding.reshard(x, P(*[None] * x.ndim)), tree)

    model = (
        lambda params, tokens: sm.embed(gathered(params), tokens),
        lambda layer, x: sm.block(gathered(layer), x),
        lambda params, x, tokens: sm.head(gathered(params), x, tokens),
    )
    data, tx = sm.batches(6), gj.galore_sgd(1e-1, momentum=0.9, **LENS)
    expected, _, _ = sm.run(
        layerwise.train_step(*sm.MODEL, tx), sm.initial(), tx.init(sm.initial()), data
    )
    sharding = shardings(mesh)
    params = jax.device_put(sm.initial(), sharding)
    state = gj.init_sharded(tx, params, sharding)
    with jax.set_mesh(mesh):
        found, _, _ = sm.run(layerwise.train_step(*model, tx), params, state, data)
    assert sm.distance(jax.device_get(found), expected) < 1e-5
    assert found["blocks"]["up"]["kernel"].sharding.spec == P(None, None, "data")
