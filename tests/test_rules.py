"""Rules are equal if and only if their callables run the same code with the same values."""

import copy
import dataclasses
import enum
import functools
import math
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax.rules import Rule


@dataclasses.dataclass(frozen=True)
class Table:
    rank: int

    def __call__(self, path, leaf):
        return self.rank

    def method(self, path, leaf):
        return self.rank


class Size(enum.Enum):
    SMALL, LARGE = 1, 2


def plain(path, leaf):
    return 8


def other(path, leaf):
    return 9


def closure(value):
    return lambda path, leaf: value


def default(value):
    return lambda path, leaf, value=value: value


def keyword(value):
    def rank(path, leaf, *, value=value):
        return value

    return rank


def nested(value):
    return lambda path, leaf: [value for _ in path]


def recursive(value):
    def rank(path, leaf):
        return rank(path[1:], leaf) if path else value

    return rank


def unassigned(value):
    function = lambda path, leaf: later  # noqa: E731
    if value is None:
        later = None
    return function


def code(expression):
    return eval(f"lambda path, leaf: {expression}", {})


# Pairs of values, made anew at each call, and whether rules of them are equal.
VALUES = {
    "integers": (lambda: (8, 8), True),
    "other integers": (lambda: (8, 4), False),
    "a bool and an integer": (lambda: (True, 1), False),
    "an integer and a float": (lambda: (1, 1.0), False),
    "zeros": (lambda: (0.0, -0.0), False),
    "nan": (lambda: (math.nan, float("nan")), True),
    "strings": (lambda: ("a|b", "a|b"), True),
    "a string and bytes": (lambda: ("a", b"a"), False),
    "tuples": (lambda: ((1, ("a", None)), (1, ("a", None))), True),
    "tuples cut elsewhere": (lambda: (("a", ("b", "c")), (("a", "b"), "c")), False),
    "a tuple and a list": (lambda: ((1,), [1]), False),
    "dicts": (lambda: ({"q": 8}, {"q": 8}), True),
    "other dicts": (lambda: ({"q": 8}, {"q": 4}), False),
    "sets": (lambda: ({"a", "b", "c"}, {"c", "b", "a"}), True),
    "patterns": (lambda: (re.compile("a"), re.compile("a")), True),
    "flags": (lambda: (re.compile("a"), re.compile("a", re.IGNORECASE)), False),
    "frozen dataclasses": (lambda: (Table(8), Table(8)), True),
    "other dataclasses": (lambda: (Table(8), Table(4)), False),
    "NumPy numbers": (lambda: (np.int32(8), np.int32(8)), True),
    "NumPy numbers of other kinds": (lambda: (np.int32(8), np.int64(8)), False),
    "dtypes": (lambda: (jnp.dtype("bfloat16"), jnp.dtype("bfloat16")), True),
    "classes": (lambda: (jnp.float32, jnp.float32), True),
    "other classes": (lambda: (jnp.float32, jnp.bfloat16), False),
    "modules": (lambda: (math, math), True),
    "other modules": (lambda: (math, re), False),
    "enumerations": (lambda: (Size.SMALL, Size.SMALL), True),
    "other members": (lambda: (Size.SMALL, Size.LARGE), False),
    "functions": (lambda: (closure(8), closure(8)), True),
    "functions with other values": (lambda: (closure(8), closure(4)), False),
    "builtin functions": (lambda: (len, len), True),
    "methods of builtins": (lambda: ({"a": 1}.get, {"a": 1}.get), True),
    "methods of other builtins": (lambda: ({"a": 1}.get, {"a": 2}.get), False),
    "objects": (lambda: (object(), object()), False),
    "one object": (lambda: (object(),) * 2, True),
    "arrays": (lambda: (np.ones(3), np.ones(3)), False),
}
HOLDERS = [closure, default, keyword, nested, recursive]


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("holder", HOLDERS, ids=lambda holder: holder.__name__)
def test_values(name, holder):
    make, equal = VALUES[name]
    ours, theirs = (Rule.of("rank", holder(value)) for value in make())
    assert (ours == theirs) == equal
    if equal:
        assert hash(ours) == hash(theirs)


CALLABLES = [
    lambda: plain,
    lambda: other,
    lambda: closure(8),
    lambda: closure(4),
    lambda: default(8),
    lambda: nested(8),
    lambda: recursive(8),
    lambda: unassigned(8),
    lambda: functools.partial(plain, leaf=1),
    lambda: functools.partial(plain, leaf=2),
    lambda: functools.partial(other, leaf=2),
    lambda: Table(8),
    lambda: Table(4),
    lambda: Table(8).method,
    lambda: code("8"),
    lambda: code("9"),
    lambda: code("8 + len(path)"),
    lambda: code("8 + hash(path)"),
    lambda: code("[8 for _ in path]"),
    lambda: code("[9 for _ in path]"),
    lambda: code("path.split"),
    lambda: code("path.strip"),
]


def test_callables():
    """Each is equal to itself made anew, and to no other; copied and pickled as well."""
    first, second = ([Rule.of("rank", make()) for make in CALLABLES] for _ in range(2))
    copies = (copy.deepcopy(first), list(map(copy.copy, first)))
    for again in (second, *copies, pickle.loads(pickle.dumps(first))):
        assert first == again and list(map(hash, first)) == list(map(hash, again))
    assert len(set(first)) == len(first)
    assert Rule.of("rank", first[0]) is first[0]
    assert Rule.of("targets", plain) != first[0]


def test_a_rule_is_called_like_its_callable():
    assert Rule.of("rank", closure(8))("w", None) == 8
    assert pickle.loads(pickle.dumps(Rule.of("rank", plain)))("w", None) == 8
    assert copy.deepcopy(Rule.of("rank", closure(8)))("w", None) == 8


def test_a_callable_that_was_dropped():
    rule = pickle.loads(pickle.dumps(Rule.of("rank", closure(8))))
    with pytest.raises(ValueError, match=r"`rank`.*<lambda>.*`update`.*regex"):
        rule("w", None)


def test_what_counts_by_identity_is_equal_to_nothing_once_it_was_pickled():
    rule = Rule.of("rank", closure(object()))
    stored = pickle.dumps(rule)
    assert pickle.loads(stored) != rule and pickle.loads(stored) != pickle.loads(stored)
    assert copy.deepcopy(rule) == rule


def test_as_a_static_part_of_a_jitted_function():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(rule, x):
        traces.append(rule)
        return x * rule("w", x)

    for value in (8, 8, 4, 8):
        assert step(Rule.of("rank", closure(value)), 1) == value
    assert len(traces) == 2
