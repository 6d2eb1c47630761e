"""Options without effect: an error where nothing is projected, a warning where less is."""

import warnings

import jax
import jax.numpy as jnp
import pytest

import galore_jax as gj
from galore_jax.views.axes import axes_rule
from galore_jax.views.notice import check_projection
from galore_jax.views.plan import Rules, rank_rule
from galore_jax.views.targets import targets_rule


def zeros(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = {
    "embed": zeros(1000, 64),
    "layers": [{"up": zeros(64, 256), "scale": zeros(64)}, {"up": zeros(64, 256)}],
}
STACK = {"blocks": {"up": zeros(12, 64, 256)}}
HEADS = {"up": zeros(64, 256), "layers": [{"attn": {"query": {"kernel": zeros(64, 4, 32)}}}] * 2}
CONV = {"up": zeros(64, 256), "conv": {"kernel": zeros(3, 3, 32, 64)}}
TINY = {"up": zeros(64, 256), "decay": zeros(3, 8, 16)}
GQA = {"q": zeros(64, 64), "k": zeros(64, 8), "v": zeros(64, 8)}
INTO_HEADS = gj.MatrixAxes(0, (1, 2))


def check(params, rank=16, targets=None, axes=None, **options):
    rules = Rules(rank_rule(rank), "short", axes_rule(axes), targets_rule(targets))
    check_projection(gj.views.leaf_plan(rules, params), rules, **options)


ERRORS = {
    "rank": (
        (PARAMS, {"rank": 128}),
        ["none of the 2 matrices is projected: rank 128 reaches the projected dimension of all of "
         "them (the largest is 64). Choose rank < 64, e.g. rank=16 or rank=0.25."],
    ),
    "callable": ((PARAMS, {"rank": lambda path, leaf: 64}), ["rank callable reaches", "64"]),
    "stack": (
        (STACK, {}),
        ["none of the 1 matrices", "(12, 64, 256) as 12 x [64, 256]",
         '"blocks/up": gj.MatrixAxes(-2, -1)', "axes=gj.MatrixAxes(-2, -1)"],
    ),
    "stack, and a rank too large": ((STACK, {"rank": 256}), ["rank 256 reaches", "256"]),
    "wrong key": ((STACK, {"axes": {"bloks": gj.MatrixAxes()}}), ["'bloks'", "'blocks/up'"]),
    "both": (
        (STACK | {"w": zeros(16, 16)}, {}),
        ["none of the 2 matrices", "1 of them (the largest is 16)", "MatrixAxes"],
    ),
    "one pattern": ((PARAMS, {"targets": "Up"}), ["`targets`", "'Up' matches no leaf", "/up'"]),
    "all patterns": ((PARAMS, {"targets": ["Up", "Down"]}), ["'Up'", "'Down'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_nothing_is_projected(name):
    (params, options), needles = ERRORS[name]
    with pytest.raises(ValueError) as error:
        check(params, **options)
    assert all(needle in str(error.value) for needle in needles), str(error.value)


WARNINGS = {
    "axes key": (
        (PARAMS, {"axes": {"up": gj.MatrixAxes(), "qerry": INTO_HEADS}}),
        ["`axes`", "'qerry' matches no leaf"],
    ),
    "one of the patterns": ((PARAMS, {"targets": ["up", "Down"]}), ["`targets`", "'Down'"]),
    "heads": (
        (HEADS, {}),
        ["2 of the leaves", r'r"layers/\d+/attn/query/kernel": gj.MatrixAxes(-3, (-2, -1))',
         "(64, 4, 32) as 1 x [64, 128]"],
    ),
    "convolution": ((CONV, {}), ["(3, 3, 32, 64) as 9 x [32, 64]", "gj.MatrixAxes(-2, -1)"]),
    "heads in a stack": (
        ({"up": zeros(64, 256), "layers": {"out": zeros(12, 4, 32, 64)}}, {}),
        ['"layers/out": gj.MatrixAxes((-3, -2), -1)', "12 x [128, 64]"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WARNINGS)
def test_less_is_projected_than_could_be(name):
    (params, options), needles = WARNINGS[name]
    said = set()
    with pytest.warns(UserWarning) as caught:
        check(params, said=said, **options)
        check(params, said=said, **options)
    (warning,) = caught
    assert all(needle in str(warning.message) for needle in needles), str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize("name", ["heads", "convolution", "heads in a stack"])
def test_the_lines_that_are_printed_can_be_written(name):
    (params, _), _ = WARNINGS[name]
    with pytest.warns(UserWarning) as caught:
        check(params)
    text = str(caught[0].message)
    axes = eval(text[text.index("{") : text.index("}") + 1], {"gj": gj})
    rules = Rules(16, "short", axes_rule(axes), None)
    assert all(plan.is_projected for plan in gj.views.leaf_plan(rules, params))
    check(params, axes=axes)


SILENT = {
    "all projected": (PARAMS, {}),
    "no leaf": ({}, {"targets": "w"}),
    "vectors only": ({"bias": zeros(64)}, {"targets": "w", "axes": {"w": gj.MatrixAxes()}}),
    "embeddings only": ({"embed": zeros(1000, 64)}, {"rank": 128}),
    "integers only": ({"table": zeros(1000, 64, dtype=jnp.int32)}, {}),
    "a row": ({"w": zeros(1, 64)}, {}),
    "a rank that reaches some": (GQA, {}),
    "a targets callable": (PARAMS, {"targets": lambda path, leaf: False}),
    "a rank callable": (STACK | PARAMS, {"rank": lambda path, leaf: None}),
    "None for all": (STACK, {"axes": {"blocks": {"up": None}}}),
    "None for one": (HEADS, {"axes": {"query": None}}),
    "a regex for biases": (PARAMS, {"targets": "scale"}),
    "small": (TINY, {}),
    "a leaf that no reading projects": (HEADS | {"w": zeros(4, 8, 8)}, {"axes": {"q": INTO_HEADS}}),
    "a part": (PARAMS, {"targets": ["up", "no"], "axes": {"q": INTO_HEADS}, "part": True}),
}


@pytest.mark.parametrize("name", SILENT)
def test_what_was_chosen_is_not_worth_a_word(name):
    params, options = SILENT[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(params, **options)


def test_a_part_of_a_model_is_warned_of():
    with pytest.warns(UserWarning, match="rank 128 reaches"):
        check(PARAMS, rank=128, part=True)
