"""`MatrixAxes`, and the ways to say them for a whole tree."""

from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj
from galore_jax.views.axes import axes_rule
from galore_jax.views.plan import Rules

PARAMS = {
    "attention": {"query": jnp.zeros((16, 4, 8)), "out": jnp.zeros((4, 8, 16))},
    "mlp": {"up": jnp.zeros((3, 16, 32)), "down": jnp.zeros((16, 24))},
}
QUERY, OUT = gj.MatrixAxes(0, (1, 2)), gj.MatrixAxes((0, 1), 2)
TREE = {
    "attention": {"query": QUERY, "out": OUT},
    "mlp": {"up": gj.MatrixAxes(), "down": None},
}


def plans(axes, params=PARAMS, **options):
    rules = {"rank": 2, "side": "short", "targets": None, "axes": axes_rule(axes)} | options
    return {p.path: p for p in gj.views.leaf_plan(SimpleNamespace(**rules), params)}


def sizes(axes, params=PARAMS, **options):
    """path -> (batch shape, kept, projected), of the projected leaves."""
    return {
        path: (plan.view.batch_shape, plan.view.kept_size, plan.view.projected_size)
        for path, plan in plans(axes, params, **options).items()
        if plan.is_projected
    }


EXPECTED = {
    "attention/out": ((), 32, 16),
    "attention/query": ((), 32, 16),
    "mlp/up": ((3,), 32, 16),
}


@pytest.mark.parametrize(
    "axes",
    [
        TREE,
        lambda params: TREE,
        {"query": QUERY, "attention/out$": OUT, "up": gj.MatrixAxes(), ".*": None},
        lambda params: {"query": QUERY, "/out": OUT, "up": gj.MatrixAxes(), "down": None},
        {
            "attention": {
                "query": optax.contrib.GaLoreDimensionNumbers(0, (1, 2)),
                "out": optax.contrib.MuonDimensionNumbers((0, 1), 2),
            },
            "mlp": {"up": optax.contrib.GaLoreDimensionNumbers(1, 2), "down": None},
        },
    ],
    ids=["tree", "callable", "regexes", "callable of regexes", "optax"],
)
def test_the_same_thing_said_in_every_way(axes):
    assert sizes(axes) == EXPECTED


def test_none_takes_leaves_with_two_axes():
    assert sizes(None) == {"mlp/down": ((), 24, 16)}
    assert "axes" in plans(None)["mlp/up"].reason


def test_a_lone_matrix_axes_takes_every_matrix():
    assert sizes(gj.MatrixAxes()) == {
        "attention/query": ((16,), 8, 4),
        "attention/out": ((4,), 16, 8),
        "mlp/up": ((3,), 32, 16),
        "mlp/down": ((), 24, 16),
    }


def test_the_first_matching_regex_wins_and_the_rest_go_by_default():
    assert sizes({"query": QUERY, "attention": None, "mlp/u": gj.MatrixAxes()}) == {
        "attention/query": ((), 32, 16),
        "mlp/up": ((3,), 32, 16),
        "mlp/down": ((), 24, 16),
    }


def test_an_entry_of_a_prefix_tree_covers_what_is_below():
    everything = {"attention": {"query": QUERY, "out": OUT}, "mlp": gj.MatrixAxes()}
    assert sizes(everything) == EXPECTED | {"mlp/down": ((), 24, 16)}
    assert sizes({"attention": None, "mlp": gj.MatrixAxes()}) == {
        "mlp/up": ((3,), 32, 16),
        "mlp/down": ((), 24, 16),
    }
    assert sizes(lambda params: {"attention": None, "mlp": {"up": None, "down": None}}) == {}


def test_a_nested_prefix_leaves_vectors_and_norms_below_it_alone():
    """`{"layers": MatrixAxes()}` and `{"model": {"layers": MatrixAxes()}}` mean the same."""
    layers = {
        "kernel": jnp.zeros((3, 16, 32)),
        "norm": {"scale": jnp.zeros((3, 16))},
        "step": jnp.zeros((7,)),
    }
    shallow = sizes({"layers": gj.MatrixAxes()}, {"layers": layers})
    assert shallow == {"layers/kernel": ((3,), 32, 16)}
    deep = sizes({"model": {"layers": gj.MatrixAxes()}}, {"model": {"layers": layers}})
    assert deep == {"model/layers/kernel": ((3,), 32, 16)}


def test_a_tree_overrides_the_default_targets():
    params = {"embed": {"table": jnp.zeros((40, 16))}, "w": jnp.zeros((16, 24))}
    named = {"embed": {"table": gj.MatrixAxes()}, "w": gj.MatrixAxes()}
    assert set(sizes(named, params)) == {"embed/table", "w"}
    assert set(sizes(named, params, targets="w")) == {"w"}


def test_a_flat_dict_of_leaf_names_is_a_tree():
    params = {"embed": jnp.zeros((40, 16)), "w": jnp.zeros((2, 16, 24))}
    axes = {"embed": gj.MatrixAxes(), "w": gj.MatrixAxes()}
    assert set(sizes(axes, params)) == {"embed", "w"}
    assert set(sizes(axes | {"embed": None}, params)) == {"w"}


class Module(eqx.Module):
    """A tree that can be called."""

    query: Any
    out: Any

    def __call__(self, params):
        raise AssertionError


@pytest.mark.parametrize("query, out", [(QUERY, OUT), (None, OUT), (None, None)])
def test_a_tree_that_can_be_called_is_a_tree(query, out):
    params = Module(**PARAMS["attention"])
    ours, theirs = (axes_rule(Module(query, out)) for _ in range(2))
    assert ours == theirs and hash(ours) == hash(theirs)
    chosen = [name for name, axes in (("query", query), ("out", out)) if axes is not None]
    assert sorted(sizes(Module(query, out), params)) == sorted(chosen)


def test_a_callable_gets_shapes():
    def axes(params):
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
        return jax.tree.map(lambda leaf: gj.MatrixAxes() if leaf.ndim == 2 else None, params)

    for rule in (axes, axes_rule(axes)):
        assert set(sizes(rule)) == {"mlp/down"}


def test_a_callable_gets_one_shape_for_a_quantized_leaf_and_none_for_a_masked_one():
    params = gj.quant.quantize_params({"a": jnp.ones((8, 512)), "b": jnp.ones((8, 512))})
    params["b"] = jax.tree.map(lambda _: optax.MaskedNode(), params["b"])
    axes = lambda params: jax.tree.map(lambda leaf: gj.MatrixAxes(1, 0), params)  # noqa: E731
    assert sizes(axes, params) == {"a": ((), 512, 8)}


def test_leaves_with_equal_paths():
    """Position says which leaf is which; for people the paths are written out."""
    params = {"a/b": jnp.zeros((16, 24)), "a": {"b": jnp.zeros((2, 8, 12))}}
    tree = {"a/b": None, "a": {"b": gj.MatrixAxes()}}
    rules = Rules(2, "short", axes_rule(tree), None)
    found = [(plan.path, plan.shape, plan.rank) for plan in gj.views.leaf_plan(rules, params)]
    assert found == [("['a']['b']", (2, 8, 12), 2), ("['a/b']", (16, 24), 0)]


@pytest.mark.parametrize("container", ["list", "tuple", "frozen"])
def test_other_containers(container):
    w = jnp.zeros((2, 16, 24))
    if container == "frozen":
        from flax.core import freeze

        assert set(sizes({"w": gj.MatrixAxes(), "v": None}, freeze({"w": w, "v": w}))) == {"w"}
        return
    make = list if container == "list" else tuple
    assert set(sizes(make([None, gj.MatrixAxes()]), make([w, w]))) == {"1"}


def test_negative_and_numpy_axes():
    assert gj.MatrixAxes(np.int64(0), [1, 2]) == gj.MatrixAxes(0, (1, 2))
    assert sizes({"query": gj.MatrixAxes(-3, (-2, -1)), ".": None}) == {
        "attention/query": ((), 32, 16)
    }


def test_rules_are_static():
    makers = (
        lambda: dict(TREE), lambda: {"query": QUERY}, lambda: QUERY, lambda: None,
        lambda: lambda params: TREE,
    )  # fmt: skip
    for make in makers:
        assert axes_rule(make()) == axes_rule(make())
        assert hash(axes_rule(make())) == hash(axes_rule(make()))
    assert axes_rule({"query": QUERY}) != axes_rule({"query": OUT})


@pytest.mark.parametrize(
    "axes", [("a", 1), (0, 1.5), (None, 1), ((0, "x"), 2), (True, False), (0, (1, np.True_))]
)
def test_axes_are_integers(axes):
    with pytest.raises(TypeError, match="integers"):
        gj.MatrixAxes(*axes)


@pytest.mark.parametrize("axes", [(0, 0), ((0, 1), 1), ((1, 1), 0)])
def test_an_axis_belongs_to_one_side(axes):
    with pytest.raises(ValueError, match="twice"):
        gj.MatrixAxes(*axes)


def test_sides_are_not_empty():
    with pytest.raises(ValueError, match="at least one axis"):
        gj.MatrixAxes((), 1)
