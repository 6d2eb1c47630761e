"""States that were somewhere else: saved, pickled, averaged, cast, or made by somebody else."""

import copy
import functools
import pickle
import re
import subprocess
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import galore_jax as gj

pytestmark = pytest.mark.standard_promotion

SHAPES = {"w": (12, 16), "stack": (3, 12, 8), "bias": (16,)}
OPTIONS = {"update_proj_gap": 2, "axes": {"stack": gj.MatrixAxes()}}


def trees(count):
    rng = np.random.default_rng(0)
    return [
        {n: jnp.asarray(0.1 * rng.normal(size=s), jnp.float32) for n, s in SHAPES.items()}
        for _ in range(count)
    ]


PARAMS, *GRADIENTS = trees(6)


def adamw(**options):
    return gj.galore_adamw(1e-2, 4, **(OPTIONS | options))


def eight_bits():
    inner = gj.quantized_state(optax.scale_by_adam(), min_size=2, block=8)
    return gj.low_rank_projection(inner, 4, refresh=2, axes=OPTIONS["axes"])


ALIASES = [getattr(gj, name) for name in gj.__all__ if re.match(r"(q_)?galore_", name)]
CASES = {
    **{
        alias.__name__: lambda alias=alias: alias(
            1e-2, 4, axes=OPTIONS["axes"],
            **({} if alias is gj.q_galore_adamw8bit else {"update_proj_gap": 2}),
        )
        for alias in ALIASES
    },
    "8 bits": eight_bits,
    "bases in 8 bits": lambda: adamw(codec=gj.codecs.int8(8)),
    "adaptive": lambda: adamw(update_proj_gap=gj.refresh.adaptive(1, patience=1)),
    "windows": lambda: gj.accumulate(adamw(), 2),
    "guarded": lambda: gj.apply_if_finite(adamw(), 2),
    "optax's guard": lambda: optax.apply_if_finite(adamw(), 2),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES)


@functools.cache
def trained(case):
    """A transformation, its jitted update, and its state in the middle of a window."""
    tx = CASES[case]()
    step, state = jax.jit(tx.update), tx.init(PARAMS)
    for gradient in GRADIENTS[:3]:
        _, state = step(gradient, state, PARAMS)
    return tx, step, state


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def assert_goes_on(case, state):
    _, step, expected = trained(case)
    assert_same(step(GRADIENTS[3], state, PARAMS), step(GRADIENTS[3], expected, PARAMS))


# Flax's msgpack


@cases
@pytest.mark.parametrize("form", ["bytes", "dict"])
def test_flax_gives_back_what_it_got(case, form):
    tx, _, state = trained(case)
    if form == "bytes":
        back = flax.serialization.from_bytes(tx.init(PARAMS), flax.serialization.to_bytes(state))
    else:
        parts = flax.serialization.to_state_dict(state)
        back = flax.serialization.from_state_dict(tx.init(PARAMS), parts)
    assert_same(back, state)
    assert_goes_on(case, back)


@pytest.mark.parametrize("quantized", [False, True])
def test_flax_gives_back_a_train_state(quantized):
    params = dict(PARAMS)
    if quantized:
        params = gj.quant.quantize_params(PARAMS, block=8, targets="w|stack")
        assert isinstance(params["w"], gj.quant.QuantizedArray)
    whole = train_state.TrainState.create(apply_fn=None, params=params, tx=adamw())
    updates, opt_state = whole.tx.update(GRADIENTS[0], whole.opt_state)
    del updates
    state = whole.replace(opt_state=opt_state, step=1)
    back = flax.serialization.from_bytes(whole, flax.serialization.to_bytes(state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


ORDERS = {
    "never": "assert not any(name.startswith('flax') for name in sys.modules)",
    "after the state": "from flax import serialization as s\nassert round_trip(s)",
}


@pytest.mark.parametrize("order", ORDERS)
def test_flax_may_come_late_or_never(order):
    program = f"""
import sys, jax, jax.numpy as jnp, galore_jax as gj
params = {{"w": jnp.ones((64, 32))}}
tx = gj.q_galore_adamw8bit(1e-2, 4)
state = tx.init(params)
def round_trip(s):
    back = s.from_bytes(tx.init(params), s.to_bytes(state))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), back, state)
    return jax.tree.structure(back) == jax.tree.structure(state) and all(jax.tree.leaves(same))
{ORDERS[order]}
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


# Pickles and copies


def rank_of_a_module(path, leaf):
    return 4


def closure(value):
    return lambda path, leaf: value


CALLABLES = {
    "function": {"rank": rank_of_a_module},
    "lambda": {"rank": lambda path, leaf: 4},
    "closure": {"rank": closure(4)},
    "partial": {"rank": functools.partial(rank_of_a_module)},
    "partial of a lambda": {"rank": functools.partial(lambda path, leaf, n: n, n=4)},
    "targets": {"targets": lambda path, leaf: "bias" not in path},
    "pattern in a closure": {
        "targets": (lambda p: lambda path, leaf: bool(p.search(path)))(re.compile("w|stack"))
    },
    "axes": {"axes": lambda params: {"w": gj.MatrixAxes(), "stack": gj.MatrixAxes(), "bias": None}},
    "regexes": {"axes": {"st.ck": gj.MatrixAxes()}, "targets": ["^w$", "stack"]},
}
COPIES = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("name", CALLABLES)
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_states_with_callable_options_go_on(name, how):
    options = {"rank": 4} | OPTIONS | CALLABLES[name]
    tx = gj.galore_adamw(1e-2, **options)
    traces = []

    @jax.jit
    def step(gradient, state):
        traces.append(None)
        return tx.update(gradient, state, PARAMS)

    _, state = step(GRADIENTS[0], tx.init(PARAMS))
    copied = COPIES[how](state)
    assert copied[0].config == state[0].config
    assert hash(copied[0].config) == hash(state[0].config)
    assert_same(step(GRADIENTS[1], copied), step(GRADIENTS[1], state))
    assert len(traces) == 1

    def body(state, gradient):
        return step(gradient, state)[::-1]

    jax.lax.scan(body, copied, jax.tree.map(lambda *x: jnp.stack(x), *GRADIENTS[2:4]))


@pytest.mark.parametrize("name", CALLABLES)
def test_an_optimizer_may_be_built_in_the_step(name):
    traces = []

    def again(function):
        return lambda *args: function(*args)

    def build():
        options = {"rank": 4} | OPTIONS | CALLABLES[name]
        fresh = {k: again(v) if callable(v) else v for k, v in options.items()}
        return gj.galore_adamw(1e-2, **fresh)

    @jax.jit
    def step(gradient, state):
        traces.append(None)
        return build().update(gradient, state, PARAMS)

    state = build().init(PARAMS)
    for gradient in GRADIENTS:
        _, state = step(gradient, state)
    assert len(traces) == 1
    jax.lax.scan(lambda s, g: step(g, s)[::-1], state, jax.tree.map(lambda x: x[None], PARAMS))


# Arithmetic on states


def floating(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def each(fn):
    return lambda state: jax.tree.map(fn, state)


def without_config(state):
    def drop(node):
        return node._replace(config=None) if isinstance(node, gj.LowRankState) else node

    return jax.tree.map(drop, state, is_leaf=lambda node: isinstance(node, gj.LowRankState))


WAYS = {
    "averaged": lambda s: jax.tree.map(lambda a, b: (a + b) / 2, s, s),
    "pmean'ed": lambda s: jax.tree.map(
        lambda x: x[0],
        jax.pmap(lambda x: jax.tree.map(lambda y: jax.lax.pmean(y, "i"), x), "i")(
            jax.tree.map(lambda x: jnp.stack([x, x]), s)
        ),
    ),
    "floats in bf16": each(lambda x: x.astype(jnp.bfloat16) if floating(x) else x),
    "all in float32": each(lambda x: x.astype(jnp.float32)),
    "flags as integers": each(lambda x: x.astype(jnp.int32) if x.dtype == bool else x),
    "flags as floats": each(lambda x: x.astype(jnp.float32) if x.dtype == bool else x),
    "NumPy": each(np.asarray),
    "no config": without_config,
}  # fmt: skip
ARITHMETIC = ("averaged", "pmean'ed", "all in float32")


def has_codes(state):
    return any(x.dtype == jnp.uint8 for x in jax.tree.leaves(state))


@cases
@pytest.mark.parametrize("way", WAYS)
def test_a_state_after_arithmetic_is_taken_or_refused(case, way):
    _, step, state = trained(case)
    changed = WAYS[way](state)
    if case == "optax's guard" and way != "NumPy":
        pytest.skip("a conditional of optax on states that it did not make")
    if has_codes(state) and way in ARITHMETIC:
        with pytest.raises(ValueError, match=r"leaf '\w+'.*codes.*uint8.*arithmetic"):
            step(GRADIENTS[3], changed, PARAMS)
        return
    ours, after = step(GRADIENTS[3], changed, PARAMS)
    theirs, expected = step(GRADIENTS[3], state, PARAMS)
    tolerance = 1e-2 if way == "floats in bf16" else 1e-6  # of the largest entry
    for name in SHAPES:
        largest = float(jnp.max(jnp.abs(theirs[name])))
        np.testing.assert_allclose(ours[name], theirs[name], atol=tolerance * largest)
    assert jax.tree.structure(after) == jax.tree.structure(expected)


# States of something else

FOREIGN = {
    "of another optimizer": (TypeError, lambda tx: optax.adamw(1e-2).init(PARAMS), "another"),
    "of other parameters": (ValueError, lambda tx: tx.init({"x": PARAMS["w"]}), "structure"),
    "of other shapes": (
        ValueError, lambda tx: tx.init(PARAMS | {"w": jnp.ones((10, 16))}), "leaf 'w'.*\\(10, 4\\)",
    ),
}  # fmt: skip
GOING_ON = ["galore_adamw", "windows", "guarded", "8 bits"]


@pytest.mark.parametrize("case", GOING_ON)
@pytest.mark.parametrize("whose", FOREIGN)
def test_the_state_of_something_else_is_refused(case, whose):
    tx, _, _ = trained(case)
    kind, make, words = FOREIGN[whose]
    with pytest.raises(kind, match=words):
        tx.update(GRADIENTS[0], make(tx), PARAMS)


@pytest.mark.parametrize("case", ["windows", "guarded", "8 bits"])
def test_no_state_is_refused(case):
    with pytest.raises(TypeError, match=r"NoneType.*init"):
        trained(case)[0].update(GRADIENTS[0], None, PARAMS)


# Gradients of other shapes and structures

SHAPES_OF_GRADIENTS = {
    "transposed": ("w", (16, 12)), "scalar": ("w", ()), "another kept size": ("w", (12, 20)),
    "one layer": ("stack", (1, 12, 8)), "no layers": ("stack", (12, 8)), "bias": ("bias", (3,)),
}  # fmt: skip


@pytest.mark.parametrize("case", GOING_ON)
@pytest.mark.parametrize("name", SHAPES_OF_GRADIENTS)
def test_gradients_of_other_shapes_are_refused(case, name):
    leaf, shape = SHAPES_OF_GRADIENTS[name]
    words = f"leaf '{leaf}'.*{re.escape(str(shape))}.*{re.escape(str(SHAPES[leaf]))}"
    _, step, state = trained(case)
    with pytest.raises(ValueError, match=words):
        step(GRADIENTS[0] | {leaf: jnp.ones(shape)}, state, PARAMS)


STRUCTURES = {
    "a leaf less": {name: GRADIENTS[0][name] for name in ("w", "stack")},
    "a leaf more": GRADIENTS[0] | {"v": GRADIENTS[0]["w"]},
    "a level more": GRADIENTS[0] | {"w": {"x": GRADIENTS[0]["w"]}},
    "None": GRADIENTS[0] | {"bias": None},
    "another name": {"v" if n == "w" else n: x for n, x in GRADIENTS[0].items()},
}


@pytest.mark.parametrize("case", GOING_ON)
@pytest.mark.parametrize("name", STRUCTURES)
def test_gradients_of_other_structures_are_refused(case, name):
    _, step, state = trained(case)
    with pytest.raises(ValueError, match="structure"):
        step(STRUCTURES[name], state, PARAMS)


@pytest.mark.parametrize("case", ["galore_adamw", "windows", "guarded", "adaptive"])
def test_sam_with_its_arithmetic_on_states(case):
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.01))
    tx = optax.contrib.sam(CASES[case](), adversary, sync_period=2, opaque_mode=False)
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    for gradient in GRADIENTS[:4]:
        updates, state = step(gradient, state, PARAMS)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in updates.values())
