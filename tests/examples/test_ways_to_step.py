"""Full or projected gradients, whole batches or micro-batches, all layers or one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from examples.llama import config, model, objective, task

LAYERWISE = ("--layerwise",)
BASE = tiny_run.GALORE | {"batch-size": 4, "clip": 0}


def losses(corpus, *flags, count=7, **options):
    line = tiny_run.arguments(corpus, "unused", *flags, **(BASE | options))
    made = task.make_task(config.resolve(config.parse(line)))
    train_step, state = made.train_step(jax.random.key(1)), made.new_state()
    batches, found = made.training(None), []
    for _ in range(count):
        state, metrics = train_step(state, next(batches))
        found.append(float(metrics.loss))
    batches.close()
    assert int(metrics.skipped) == 0
    return np.array(found), state


@pytest.fixture(scope="module")
def full(corpus):
    """Gradients that are formed before they are projected."""
    return losses(corpus, backward="full")


@pytest.mark.parametrize(
    "flags, options",
    [((), {}), (LAYERWISE, {}), ((), {"head-chunk": 4}), (LAYERWISE, {"backward": "full"})],
    ids=str,
)
@pytest.mark.sampled(1)
def test_all_ways_are_one(corpus, full, flags, options):
    found, state = losses(corpus, *flags, **options)
    np.testing.assert_allclose(found, full[0], rtol=1e-5)
    assert jax.tree.structure(state) == jax.tree.structure(full[1])


@pytest.mark.parametrize("backward", ["full", "projected"])
@pytest.mark.sampled(1)
def test_clipping_by_layers_and_at_once(corpus, backward):
    options = {"clip": 1e-2, "backward": backward}
    found, _ = losses(corpus, **options)
    by_layer, _ = losses(corpus, *LAYERWISE, **options)
    np.testing.assert_allclose(by_layer, found, rtol=1e-5)


def test_micro_batches_have_one_basis(corpus):
    """Between refreshes the same as one batch; the first refresh sees the first micro-batch."""
    whole, _ = losses(corpus)
    parts, state = losses(corpus, accumulation=2)
    assert abs(parts[0] - whole[0]) < 1e-5 and np.max(np.abs(parts - whole)) < 2e-2
    assert jax.tree.structure(state) == jax.tree.structure(losses(corpus, count=1)[1])


@pytest.mark.parametrize("weights", ["full", "int8"])
@pytest.mark.sampled(1)
def test_layers_one_by_one_and_micro_batches(corpus, weights):
    options = {"accumulation": 2, "weights": weights}
    found, state = losses(corpus, *LAYERWISE, **options)
    expected, expected_state = losses(corpus, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-5 if weights == "full" else 1e-4)
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    assert state.opt_state.inner_state[1][0].count == 7


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.sampled(1)
def test_the_head_in_pieces(weighted):
    llama = model.LlamaConfig(32, 16, 24, 1, 2, 12)
    params = model.init(llama, jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 3, 12), 0, 32)
    batch = {"inputs": ids[0], "targets": ids[1]}
    if weighted:
        batch["weights"] = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 12)))
    value_and_grad = jax.value_and_grad(objective.loss, argnums=1)
    whole = value_and_grad(llama, params, batch)
    pieces = value_and_grad(dataclasses.replace(llama, head_chunk=4), params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), pieces, whole)
    with pytest.raises(ValueError, match="head_chunk 5"):
        objective.loss(dataclasses.replace(llama, head_chunk=5), params, batch)
