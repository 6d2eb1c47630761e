"""Numbers, dtypes and transformations that cannot be meant are refused when they are given."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj

NAN = float("nan")
PARAMS = {"w": jnp.ones((64, 32))}


def lens(rank=4, **options):
    return gj.low_rank_projection(optax.trace(0.9), rank, **options)


# Name of a count -> something made with it.
COUNTS = {
    "gap of every": (1, gj.refresh.every),
    "gap of staggered": (1, gj.refresh.staggered),
    "gap of adaptive": (1, gj.refresh.adaptive),
    "gap as a number": (1, lambda n: lens(refresh=n)),
    "gap of an alias": (1, lambda n: gj.galore_adamw(1e-2, 4, update_proj_gap=n)),
    "patience": (1, lambda n: gj.refresh.adaptive(5, patience=n)),
    "max_gap": (1, lambda n: gj.refresh.adaptive(1, max_gap=n)),
    "every": (1, lambda n: gj.accumulate(optax.sgd(1.0), n)),
    "max_consecutive_errors": (0, lambda n: gj.apply_if_finite(optax.sgd(1.0), n)),
    "oversample": (0, lambda n: gj.projectors.randomized_svd(oversample=n)),
    "power_iters": (1, lambda n: gj.projectors.randomized_svd(power_iters=n)),
    "steps": (1, lambda n: gj.projectors.subspace_iteration(steps=n)),
    "block of int8": (1, gj.codecs.int8),
    "block of int4": (1, gj.codecs.int4),
    "block of moments": (1, lambda n: gj.quantized_state(optax.trace(0.9), block=n)),
    "block of an array": (1, lambda n: gj.quant.quantize(jnp.ones((3, 8)), block=n)),
    "min_size": (0, lambda n: gj.quantized_state(optax.trace(0.9), min_size=n)),
}
NO_COUNTS = [True, np.True_, 2.0, NAN, "3", [3], np.float32(2.0), np.asarray([1, 2])]
counts = pytest.mark.parametrize("name", COUNTS)


def said(name):
    return {"gap": "`gap`", "block": "`block`"}.get(name.split()[0], f"`{name}`")


@counts
@pytest.mark.parametrize("beyond", [2**31, 2**32, 2**40, -(2**31), -1])
def test_counts_out_of_range(name, beyond):
    _, make = COUNTS[name]
    with pytest.raises(ValueError, match=f"{said(name)}.*{beyond}"):
        make(beyond)


@counts
@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
def test_what_is_no_count(name, value):
    _, make = COUNTS[name]
    with pytest.raises(TypeError, match=said(name)):
        make(value)


@counts
def test_the_least_count(name):
    least, make = COUNTS[name]
    make(least)
    with pytest.raises(ValueError, match=f"{said(name)}.*at least {least}"):
        make(least - 1)


@counts
@pytest.mark.parametrize(
    "kind", [np.int32, np.int64, np.uint8, np.asarray], ids=lambda k: k.__name__
)
def test_numpy_integers_are_integers(name, kind):
    _, make = COUNTS[name]
    ours, theirs = make(5), make(kind(5))
    if isinstance(ours, optax.GradientTransformation):
        return
    if isinstance(ours, gj.quant.QuantizedArray):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        return
    assert ours == theirs and hash(ours) == hash(theirs) and repr(ours) == repr(theirs)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8], ids=lambda kind: kind.__name__)
def test_lenses_of_numpy_integers_are_those_of_integers(kind):
    options = [{"rank": n(4), "refresh": n(7), "seed": n(3)} for n in (int, kind)]
    ours, theirs = (lens(**given).init(PARAMS).config for given in options)
    assert ours == theirs and hash(ours) == hash(theirs)


adaptive, axes, cast = gj.refresh.adaptive, gj.MatrixAxes, gj.codecs.cast
VALUE = jnp.ones((64, 4)), jnp.eye(32, 4)
OTHERS = {
    "threshold nan": (ValueError, lambda: adaptive(5, threshold=NAN), ["`threshold`", "nan"]),
    "threshold zero": (ValueError, lambda: adaptive(5, threshold=0.0), ["`threshold`", "(0, 1]"]),
    "threshold above": (ValueError, lambda: adaptive(5, threshold=1.5), ["`threshold`", "1.5"]),
    "threshold bool": (TypeError, lambda: adaptive(5, threshold=True), ["`threshold`", "True"]),
    "threshold text": (TypeError, lambda: adaptive(5, threshold="x"), ["`threshold`", "'x'"]),
    "threshold none": (TypeError, lambda: adaptive(5, threshold=None), ["`threshold`", "None"]),
    "growth nan": (ValueError, lambda: adaptive(5, growth=NAN), ["`growth`", "nan"]),
    "growth one": (ValueError, lambda: adaptive(5, growth=1.0), ["`growth`", "1.0"]),
    "growth bool": (TypeError, lambda: adaptive(5, growth=True), ["`growth`", "True"]),
    "growth text": (TypeError, lambda: adaptive(5, growth="2"), ["`growth`", "'2'"]),
    "max_gap below": (ValueError, lambda: adaptive(5, max_gap=4), ["`max_gap`", "4", "5"]),
    "warm start": (
        TypeError,
        lambda: gj.projectors.randomized_svd(warm_start="no"),
        ["`warm_start`", "'no'"],
    ),
    "cast none": (TypeError, lambda: cast(None), ["floating", "None"]),
    "cast complex": (TypeError, lambda: cast(complex), ["floating", "complex"]),
    "cast text": (TypeError, lambda: cast("real"), ["floating", "'real'"]),
    "state none": (TypeError, lambda: lens(state_dtype=None), ["`state_dtype`", "None"]),
    "state complex": (
        TypeError, lambda: lens(state_dtype="complex64"), ["`state_dtype`", "complex64"],
    ),
    "state float16": (
        TypeError, lambda: lens(state_dtype="float16"), ["`state_dtype`", "float16", "bfloat16"],
    ),
    "axes bool": (TypeError, lambda: axes(True, False), ["MatrixAxes", "True"]),
    "axes bools": (TypeError, lambda: axes((0, True), 2), ["MatrixAxes", "True"]),
    "axes float": (TypeError, lambda: axes(1.0, 0), ["MatrixAxes", "1.0"]),
    "axes regex": (ValueError, lambda: lens(axes={"(": axes()}), ["`axes`", "'('", "regex"]),
    "targets regex": (ValueError, lambda: lens(targets=["w", "["]), ["`targets`", "'['"]),
    "targets bytes": (TypeError, lambda: lens(targets=b"w"), ["`targets`", "b'w'"]),
    "seed bool": (TypeError, lambda: lens(seed=True), ["`seed`", "True"]),
    "no basis": (
        TypeError,
        lambda: gj.ProjectedGradient(VALUE[0], None),
        ["`basis`", "None", "the gradient itself"],
    ),
    "no value": (TypeError, lambda: gj.ProjectedGradient(None, VALUE[1]), ["`value`", "None"]),
    "a list": (TypeError, lambda: gj.ProjectedGradient([1.0], VALUE[1]), ["`value`", "[1.0]"]),
    **{
        f"{name} of {getattr(value, '__name__', value)}": (
            TypeError,
            lambda f=f, value=value: f(value),
            [f"`{name}`"],
        )
        for name, f in {
            "inner": lambda tx: gj.low_rank_projection(tx, 4),
            "inner ": lambda tx: gj.apply_if_finite(tx, 3),
            "inner  ": gj.quantized_state,
            "tx": lambda tx: gj.accumulate(tx, 2),
        }.items()
        for value in (None, 3, "adam", optax.scale_by_adam)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_others(name):
    kind, call, words = OTHERS[name]
    with pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind
    assert all(word.replace(" `", "`").replace(" `", "`") in str(error.value) for word in words)
