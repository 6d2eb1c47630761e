"""Signatures of the aliases, and that Adam's options mean what they mean to optax."""

import inspect
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj

SHARED = (
    "projector=None, transport=None, recovery=None, side='short', targets=None, codec=None, "
    "state_dtype='float32', axis_name=None, seed=None"
)
OWN = {
    gj.galore_adamw: "b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, mu_dtype=None, nesterov=False",
    gj.galore_adamw8bit: "b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, nesterov=False",
    gj.q_galore_adamw8bit: "b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, nesterov=False",
    gj.galore_adafactor: "decay_rate=0.8, clipping_threshold=1.0, momentum=0.9, epsilon=1e-30",
    gj.galore_lion: "b1=0.9, b2=0.99",
    gj.galore_sgd: "momentum=None, nesterov=False",
}
SIGNATURES = {
    alias: f"(learning_rate, rank=128, *, update_proj_gap=200, scale=0.25, {own}, "
    f"weight_decay=0.0, mask=None, axes=None, {SHARED})"
    for alias, own in OWN.items()
} | {
    gj.galore: "(learning_rate, rank=128, update_proj_gap=200, scale=1.0, base_optimizer=None, "
    f"weight_decay=0.0, mask=None, weight_dimension_numbers=None, *, axes=None, {SHARED})"
}
every_alias = pytest.mark.parametrize("alias", SIGNATURES, ids=lambda alias: alias.__name__)


@every_alias
def test_signatures(alias):
    signature = inspect.signature(alias)
    names = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(names)) == SIGNATURES[alias]
    assert signature.return_annotation == "optax.GradientTransformationExtraArgs"


@every_alias
def test_shared_options_have_the_same_annotations_and_all_of_them_resolve(alias):
    ours, general = typing.get_type_hints(alias), typing.get_type_hints(gj.galore)
    assert list(ours) == [*inspect.signature(alias).parameters, "return"]
    assert {name: ours[name] for name in general if name in ours}.items() <= general.items()


@every_alias
def test_docstrings_explain_every_argument_in_order(alias):
    args = inspect.getdoc(alias).partition("\nArgs:\n")[2].partition("\n\n")[0]
    explained = re.findall(r"^  (\w+): ", args, flags=re.MULTILINE)
    assert explained == list(inspect.signature(alias).parameters)


@every_alias
def test_options_of_the_lens_reach_every_alias(alias):
    lens = set(inspect.signature(gj.low_rank_projection).parameters)
    renamed = {"inner", "refresh"}  # the alias' own optimizer, update_proj_gap
    assert lens - renamed <= set(inspect.signature(alias).parameters)


def test_static_args_are_all_shared_options_but_the_numbers():
    shared = set.intersection(*(set(inspect.signature(alias).parameters) for alias in SIGNATURES))
    assert set(gj.STATIC_ARGS) == shared - {"learning_rate", "scale", "weight_decay"}


@pytest.mark.parametrize(
    "alias, name",
    [(alias, "nonsense") for alias in SIGNATURES]
    + [(alias, name) for alias in OWN for name in ("base_optimizer", "weight_dimension_numbers")],
)
def test_other_arguments_are_refused(alias, name):
    with pytest.raises(TypeError, match=rf"^{alias.__name__}\(\).* unexpected .*'{name}'"):
        alias(1e-2, **{name: None})


# Adam as optax has it

ADAMS = {
    gj.galore_adamw: [{"eps_root": 1e-2}, {"nesterov": True}, {"mu_dtype": "bfloat16"}],
    gj.galore_adamw8bit: [{"eps_root": 1e-2}, {"nesterov": True}],
    gj.q_galore_adamw8bit: [{"eps_root": 1e-2}, {"nesterov": True}],
}
SHAPES = {"bias": (9,), "embed": (11, 6), "layers": (2, 6, 9), "tall": (9, 6), "square": (6, 6)}
LENS = {"axes": {"layers": gj.MatrixAxes()}, "update_proj_gap": 2}


def tree(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in SHAPES.items()}


def follow(tx, steps=4):
    """The updates of all steps, and the state after the last."""
    params, state, updates = tree(0), tx.init(tree(0)), []
    for seed in range(1, steps + 1):
        update, state = jax.jit(tx.update)(tree(seed), state, params)
        params = optax.apply_updates(params, update)
        updates.append(update)
    return updates, state


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "alias, numbers", [(alias, numbers) for alias, table in ADAMS.items() for numbers in table]
)
def test_adamw_of_optax_where_nothing_is_projected(alias, numbers):
    common = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1} | numbers
    ours, _ = follow(alias(0.1, 1.0, **common, **LENS))
    theirs, _ = follow(optax.adamw(0.1, **common))
    plain, _ = follow(optax.adamw(0.1, **{k: v for k, v in common.items() if k not in numbers}))
    for ours_step, theirs_step in zip(ours, theirs, strict=True):
        for name, update in ours_step.items():
            np.testing.assert_allclose(update, theirs_step[name], rtol=1e-5, atol=1e-7)
    assert not np.allclose(ours[-1]["embed"], plain[-1]["embed"], rtol=1e-4)


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "transport",
    [gj.transport.align(), gj.transport.rotate(), gj.transport.reset(), gj.transport.keep()],
    ids=repr,
)
def test_first_moment_keeps_its_dtype_when_bases_move(transport):
    options = LENS | {"projector": gj.projectors.svd(), "transport": transport}
    updates, (lens, *_) = follow(gj.galore_adamw(0.1, 3, mu_dtype="bfloat16", **options))
    wide, _ = follow(gj.galore_adamw(0.1, 3, **options))
    assert {x.dtype for x in jax.tree.leaves(lens.inner_state.mu)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(lens.inner_state.nu)} == {jnp.dtype("float32")}
    for name, update in updates[-1].items():
        assert update.dtype == jnp.float32
        np.testing.assert_allclose(update, wide[-1][name], atol=0.1 * 2**-7)
