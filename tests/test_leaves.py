"""What one leaf is: boxes, holes, leaves that nothing can be projected of, and their paths."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import galore_jax as gj
from galore_jax.leaves import Leaves
from galore_jax.views import ProjectedGradient


def lens(**options):
    return gj.low_rank_projection(optax.trace(0.9), 2, **options)


def boxed():
    return {
        "w": nn.Partitioned(jnp.ones((8, 6)), names=("x", "y")),
        "b": nn.LogicallyPartitioned(jnp.ones((6,)), names=("y",)),
        "plain": jnp.ones((8, 6)),
    }


def test_linen_boxes_come_off_and_go_back_on():
    leaves = Leaves.of(boxed())
    assert [leaf.shape for leaf in leaves.values] == [(6,), (8, 6), (8, 6)]
    assert set(leaves.tree(leaves.values)) == {"w", "b", "plain"}
    again = leaves.boxed([leaf + 1 for leaf in leaves.values])
    assert isinstance(again["w"], nn.Partitioned) and again["w"].names == ("x", "y")
    assert isinstance(again["b"], nn.LogicallyPartitioned)
    np.testing.assert_array_equal(again["w"].value, np.full((8, 6), 2))


def test_a_boxed_tree_is_optimised_like_an_unboxed_one():
    tx = lens()
    bare = nn.unbox(boxed())
    state, expected = tx.init(boxed()), tx.init(bare)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    updates, _ = jax.jit(tx.update)(boxed(), state)
    plain, _ = jax.jit(tx.update)(bare, expected)
    assert jax.tree.structure(updates) == jax.tree.structure(boxed())
    for ours, theirs in zip(jax.tree.leaves(updates), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(ours, theirs)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.norm = nnx.LayerNorm(12, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(20, 8, rngs=rngs)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])


def test_nnx_paths_have_no_value():
    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    assert Leaves.of(state).paths == [
        "blocks/0/norm/bias", "blocks/0/norm/scale", "blocks/0/up/bias", "blocks/0/up/kernel",
        "blocks/1/norm/bias", "blocks/1/norm/scale", "blocks/1/up/bias", "blocks/1/up/kernel",
        "embed/embedding",
    ]  # fmt: skip
    tx = lens()
    projectors = tx.init(state).projectors
    pairs = zip(Leaves.of(projectors).paths, jax.tree.leaves(projectors), strict=True)
    assert {path for path, basis in pairs if basis.ndim} == {
        "blocks/0/up/kernel",
        "blocks/1/up/kernel",
    }
    updates, _ = jax.jit(tx.update)(state, tx.init(state))
    assert jax.tree.structure(updates) == jax.tree.structure(state)


def test_paths_of_other_trees():
    class Named(optax.ScaleByLionState):
        pass

    tree = [{"a": jnp.zeros(())}, optax.TraceState(trace=(jnp.zeros(()), None, jnp.zeros(())))]
    assert Leaves.of(tree).paths == ["0/a", "1/trace/0", "1/trace/2"]
    assert Leaves.of(jnp.zeros(())).paths == [""]


def test_holes_stay_holes():
    tx = lens()
    params = {"w": jnp.ones((8, 6)), "none": None, "masked": optax.MaskedNode(), "empty": ()}
    state = tx.init(params)
    updates, new = jax.jit(tx.update)(params, state)
    assert updates["none"] is None and updates["empty"] == ()
    assert updates["masked"] == optax.MaskedNode()
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_integer_leaves_pass_through_untouched():
    tx = lens()
    params = {"w": jnp.ones((8, 6)), "n": jnp.arange(48).reshape(8, 6), "flag": jnp.array(True)}
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(params, state)
    np.testing.assert_array_equal(updates["n"], params["n"])
    assert updates["n"].dtype == params["n"].dtype and updates["flag"].dtype == bool
    assert state.inner_state.trace["n"] == optax.MaskedNode()


def test_gradients_of_integer_leaves_pass_through():
    """jax gives them the dtype float0."""
    tx = lens()
    params = {"w": jnp.ones((8, 6)), "n": jnp.arange(3)}
    gradient = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    updates, _ = tx.update(gradient, tx.init(params))
    assert updates["n"].dtype == jax.dtypes.float0


def test_complex_leaves_go_through_the_inner_at_full_size():
    tx = lens()
    params = {"w": jnp.ones((8, 6)), "c": jnp.full((8, 6), 1 + 2j)}
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    assert updates["c"].dtype == jnp.complex64
    np.testing.assert_allclose(updates["c"], params["c"])
    assert state.projectors["c"].shape == () and state.projectors["w"].shape == (6, 2)


def test_every_leaf_has_an_array_and_none_is_empty():
    state = lens().init({"w": jnp.ones((8, 6)), "b": jnp.ones((6,)), "n": jnp.arange(3)})
    assert set(state.projectors) == {"w", "b", "n"}
    assert all(array.size > 0 for array in jax.tree.leaves(state))
    # Flags are kept of what is projected, and of nothing else.
    assert {frozenset(field) for field in state.refresh_state} == {frozenset({"w"})}


def test_abstract_parameters_give_the_concrete_structure():
    params = {"w": jnp.ones((8, 6)), "b": jnp.ones((6,)), "n": jnp.arange(3)}
    abstract = jax.eval_shape(lambda: params)
    tx = lens()
    concrete, lazy = tx.init(params), jax.eval_shape(tx.init, abstract)
    direct = tx.init(abstract)
    for other in (lazy, direct):
        assert jax.tree.structure(other) == jax.tree.structure(concrete)
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(concrete), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_a_projected_gradient_is_one_leaf_here_and_several_to_jax():
    value, basis = jnp.ones((8, 2)), jnp.eye(6, 2)
    leaf = ProjectedGradient(value, basis, jnp.asarray(True))
    assert Leaves.of({"w": leaf}).paths == ["w"]
    assert len(jax.tree.leaves({"w": leaf})) == 4
    np.testing.assert_array_equal(leaf.basis, basis)
    assert leaf.moved and ProjectedGradient(value, basis).moved is None
    assert not ProjectedGradient(value, basis, jnp.asarray(False)).moved


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
@pytest.mark.parametrize("factor", [0.37, -3.0, 1e-6])
def test_a_common_factor_reaches_the_value_of_a_projected_gradient_only(factor, dtype):
    basis = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0], dtype)
    leaf = ProjectedGradient(jnp.ones((8, 2)), basis, jnp.asarray([True, False]))
    assert optax.tree.norm({"w": leaf}) == optax.tree.norm(jnp.ones((8, 2)))
    scaled = jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), leaf)
    np.testing.assert_allclose(scaled.value, np.full((8, 2), factor), rtol=1e-6)
    np.testing.assert_allclose(scaled.basis, basis.astype(jnp.float32), rtol=1e-6)
    np.testing.assert_array_equal(scaled.moved, [True, False])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_have_the_dtype_of_the_gradient(dtype):
    params = {"w": jnp.ones((8, 6), dtype), "b": jnp.ones((6,), dtype)}
    tx = lens()
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    assert updates["w"].dtype == dtype and updates["b"].dtype == dtype
    assert state.projectors["w"].dtype == jnp.float32
    assert state.inner_state.trace["w"].dtype == state.inner_state.trace["b"].dtype == jnp.float32
