"""`reset` and `rotate` rewrite moments: against the NumPy twin, and what they refuse."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import numpy_galore as twin

import galore_jax as gj
from galore_jax import projectors
from galore_jax.transport import BasisChange

SHAPE, RANK, GAP, STEPS = (10, 7), 3, 3, 11
MOVED = jnp.asarray(True), jnp.asarray(False)  # and not for the first time


def positive(gradient, rank, axis):
    """The exact SVD with a sign rule, so that fp32 and float64 agree on the columns."""
    basis = twin.singular_vectors(gradient, rank, axis)
    return basis * np.sign(basis[np.argmax(np.abs(basis), axis=0), np.arange(rank)])


class Mean(twin.Galore):
    """`reset(second="mean")`, which the twin does not know."""

    def refresh(self, grad):
        before = self.basis
        super().refresh(grad)
        if self.basis is not before:
            mean = np.full_like(self.state["nu"], np.mean(self.state["nu"]))
            self.state = self.state | {"mu": np.zeros_like(self.state["mu"]), "nu": mean}


def drifting(shape=SHAPE, steps=STEPS, seed=0):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(steps, *shape))
    return (rng.normal(size=shape) + 0.4 * noise).astype(np.float32)


def lens(inner, transport, **options):
    return gj.low_rank_projection(
        inner, RANK, refresh=GAP, transport=transport,
        projector=projectors.svd(signs="positive"), **options,
    )  # fmt: skip


def oracle(transport, inner, shape=SHAPE, side="short", kind=twin.Galore):
    return kind(
        shape, RANK, inner, gap=GAP, lr=1.0, transport=transport, side=side, basis_of=positive
    )


INNERS = {
    "adam": (optax.scale_by_adam(eps=1e-2), twin.adam(eps=1e-2)),
    "adam, other decays": (
        optax.scale_by_adam(b1=0.5, b2=0.8, eps=1e-2),
        twin.adam(b1=0.5, b2=0.8, eps=1e-2),
    ),
    "trace": (optax.trace(0.9), twin.trace(0.9)),
}


@pytest.mark.parametrize(
    "transport, name, side",
    [
        ("reset", "adam", "short"),
        ("reset", "trace", "long"),
        ("rotate", "adam", "long"),
        ("rotate", "adam, other decays", "short"),
        ("rotate", "trace", "short"),
    ],
)
def test_equals_the_twin(relaxed, transport, name, side):
    inner, reference = INNERS[name]
    decays = {"b1": reference.b1, "b2": reference.b2} if name.startswith("adam") else {}
    ours = gj.transport.reset() if transport == "reset" else gj.transport.rotate(**decays)
    tx = lens(relaxed(inner), ours, side=side)
    theirs = oracle(transport, reference, side=side)
    state, update = tx.init({"w": jnp.zeros(SHAPE)}), jax.jit(tx.update)
    for gradient in drifting():
        updates, state = update({"w": gradient}, state)
        expected = -theirs.step(np.zeros(SHAPE), gradient)
        np.testing.assert_allclose(updates["w"], expected, atol=5e-4)
        for moment in ("mu", "nu", "trace"):
            if moment in theirs.state:
                np.testing.assert_allclose(
                    getattr(state.inner_state, moment)["w"], theirs.state[moment], atol=5e-4
                )
    assert state.refresh_state.refreshes["w"] == 4


def test_reset_to_the_mean(relaxed):
    tx = lens(relaxed(optax.scale_by_adam(eps=1e-2)), gj.transport.reset(second="mean"))
    theirs = oracle("keep", twin.adam(eps=1e-2), kind=Mean)
    state, update = tx.init({"w": jnp.zeros(SHAPE)}), jax.jit(tx.update)
    for gradient in drifting():
        updates, state = update({"w": gradient}, state)
        expected = -theirs.step(np.zeros(SHAPE), gradient)
        np.testing.assert_allclose(updates["w"], expected, atol=5e-4)


STACKED = {
    "reset": (gj.transport.reset(), twin.Galore),
    "mean": (gj.transport.reset(second="mean"), Mean),
    "rotate": (gj.transport.rotate(), twin.Galore),
}


@pytest.mark.parametrize("policy", [gj.refresh.every(GAP), gj.refresh.staggered(GAP)], ids=repr)
@pytest.mark.parametrize("name", STACKED)
def test_each_matrix_of_a_stack_is_moved_when_its_own_basis_moves(relaxed, name, policy):
    ours, kind = STACKED[name]
    tx = gj.low_rank_projection(
        relaxed(optax.scale_by_adam(eps=1e-2)), RANK, refresh=policy, transport=ours,
        projector=projectors.svd(signs="positive"), axes=gj.MatrixAxes(),
    )  # fmt: skip
    matrices = 3
    oracles = []
    for i in range(matrices):
        theirs = oracle("keep" if name == "mean" else name, twin.adam(eps=1e-2), kind=kind)
        phase = 0 if isinstance(policy, gj.refresh.every) else i * GAP // matrices
        oracles.append((theirs, phase))
    gradients = np.stack([drifting(seed=seed) for seed in range(matrices)], axis=1)
    state, update = tx.init({"w": jnp.zeros((matrices, *SHAPE))}), jax.jit(tx.update)
    for count, stack in enumerate(gradients):
        updates, state = update({"w": stack}, state)
        for i, (theirs, phase) in enumerate(oracles):
            theirs.due = count == 0 or count % GAP == phase
            theirs.gap = 10**9 if count else 1  # only `due` decides
            expected = -theirs.step(np.zeros(SHAPE), stack[i])
            np.testing.assert_allclose(updates["w"][i], expected, atol=5e-4)


def moments_after_a_move(inner_state, transport, change, rank=4):
    """The state of a leaf `[6, rank]` after its basis moved by the rotation `change`."""
    old = np.linalg.qr(np.random.default_rng(0).normal(size=(9, rank)))[0]
    treedef = jax.tree.structure({"w": 0})
    move = BasisChange(
        jnp.asarray(old, jnp.float32), jnp.asarray(old @ change.T, jnp.float32), *MOVED
    )
    return jax.jit(lambda state: transport.carry(state, treedef, [move]))(inner_state)


def adam_state(seed=0, rank=4, count=5):
    rng = np.random.default_rng(seed)
    draw = {"w": jnp.asarray(rng.normal(size=(6, rank)), jnp.float32)}
    square = {"w": jnp.asarray(0.01 + rng.uniform(size=(6, rank)), jnp.float32)}
    return optax.ScaleByAdamState(jnp.int32(count), draw, square)


@pytest.mark.parametrize("count", [0, 5])
def test_rotating_by_a_signed_permutation_permutes_the_moments(count):
    state = adam_state(count=count)
    permutation = np.eye(4)[[2, 0, 3, 1]] * np.array([[1], [-1], [1], [-1]])
    moved = moments_after_a_move(state, gj.transport.rotate(), permutation)
    np.testing.assert_allclose(moved.mu["w"], state.mu["w"] @ permutation.T, atol=1e-5)
    np.testing.assert_allclose(moved.nu["w"], state.nu["w"] @ abs(permutation).T, atol=1e-4)
    assert moved.count == count


def test_rotating_lion_moves_its_momentum():
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    momentum = adam_state().mu
    state = optax.ScaleByLionState(jnp.int32(3), momentum)
    moved = moments_after_a_move(state, gj.transport.rotate(), rotation)
    np.testing.assert_allclose(moved.mu["w"], momentum["w"] @ rotation.T, atol=1e-5)


def test_rotated_second_moments_are_never_negative():
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    # A momentum larger than the second moment allows for: the variance comes out negative.
    state = adam_state()._replace(mu={"w": 10 * adam_state().mu["w"]})
    moved = moments_after_a_move(state, gj.transport.rotate(), rotation)
    assert np.all(np.asarray(moved.nu["w"]) >= 0)


def test_a_direction_that_is_new_takes_the_mean_of_its_row():
    """A basis without overlap: m = 0, v = the row mean of v, not nearly zero."""
    both = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 8)))[0].astype(np.float32)
    move = BasisChange(jnp.asarray(both[:, :4]), jnp.asarray(both[:, 4:]), *MOVED)
    state = adam_state()
    moved = gj.transport.rotate().carry(state, jax.tree.structure({"w": 0}), [move])
    np.testing.assert_allclose(moved.mu["w"], np.zeros((6, 4)), atol=1e-5)
    mean = np.mean(state.nu["w"], axis=1, keepdims=True)
    np.testing.assert_allclose(moved.nu["w"], np.broadcast_to(mean, (6, 4)), rtol=1e-4)


@pytest.mark.parametrize(
    "transport", [gj.transport.reset(), gj.transport.rotate(), gj.transport.align()], ids=repr
)
def test_nothing_moves_where_no_basis_moved(transport):
    state = adam_state()
    other = jnp.asarray(np.eye(9, 4), jnp.float32)
    move = BasisChange(other, other[::-1], jnp.asarray(False), jnp.asarray(False))
    for moves in ([move], [None]):
        carried = transport.carry(state, jax.tree.structure({"w": 0}), moves)
        for ours, theirs in zip(jax.tree.leaves(carried), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_adabelief_is_refused():
    """Its second moment is a variance: the rule for averages of squares would be wrong for it."""
    with pytest.raises(TypeError, match="align"):
        lens(optax.scale_by_belief(), gj.transport.rotate()).init({"w": jnp.zeros(SHAPE)})


class Velocity(NamedTuple):
    speed: optax.Updates


def custom_momentum():
    def update(updates, state, params=None):
        speed = jax.tree.map(lambda g, s: 0.9 * s + g, updates, state.speed)
        return speed, Velocity(speed)

    return optax.GradientTransformation(
        lambda params: Velocity(jax.tree.map(jnp.zeros_like, params)), update
    )


@pytest.mark.parametrize(
    "transport",
    [gj.transport.reset(), gj.transport.reset(second="mean"), gj.transport.rotate()],
    ids=repr,
)
@pytest.mark.parametrize(
    "make",
    [
        custom_momentum,
        gj.scale_by_factored_rms,
        lambda: optax.chain(optax.trace(0.9), custom_momentum()),
    ],
    ids=["custom", "factored", "chain"],
)
def test_unknown_states_are_refused_in_init(make, transport, monkeypatch):
    class Velocity(NamedTuple):  # a class that nobody registered
        speed: optax.Updates

    monkeypatch.setitem(globals(), "Velocity", Velocity)
    tx = lens(make(), transport)
    with pytest.raises(TypeError, match="align") as error:
        tx.init({"w": jnp.zeros(SHAPE)})
    assert "register_moment" in str(error.value) and f"{SHAPE[0]}" in str(error.value)


def test_registering_makes_a_state_known(monkeypatch):
    class Velocity(NamedTuple):
        speed: optax.Updates

    monkeypatch.setitem(globals(), "Velocity", Velocity)
    gj.transport.register_moment(Velocity, first="speed")
    tx, theirs = lens(custom_momentum(), gj.transport.rotate()), oracle("rotate", twin.trace(0.9))
    state, update = tx.init({"w": jnp.zeros(SHAPE)}), jax.jit(tx.update)
    for gradient in drifting():
        updates, state = update({"w": gradient}, state)
        np.testing.assert_allclose(updates["w"], -theirs.step(np.zeros(SHAPE), gradient), atol=5e-4)


def test_register_moment_refuses_what_cannot_be():
    with pytest.raises(TypeError, match="NamedTuple"):
        gj.transport.register_moment(dict, first="mu")
    with pytest.raises(TypeError, match="NamedTuple"):
        gj.transport.register_moment(Velocity({}), first="speed")
    with pytest.raises(ValueError, match="'mu'"):
        gj.transport.register_moment(Velocity, first="mu")
    with pytest.raises(ValueError, match="'nu'"):
        gj.transport.register_moment(Velocity, first="speed", second=("nu",))


KNOWN = [
    optax.scale_by_adam(), optax.scale_by_adam(nesterov=True), optax.scale_by_amsgrad(),
    optax.scale_by_adamax(), optax.scale_by_lion(), optax.trace(0.9),
    optax.ema(0.9), optax.scale_by_rms(), optax.scale_by_stddev(), optax.scale_by_rss(),
    optax.identity(), optax.sgd(1.0, momentum=0.9), optax.scale_by_sign(),
    optax.apply_if_finite(optax.scale_by_adam(), 3),
    optax.inject_hyperparams(optax.scale_by_adam)(b1=0.8),
]  # fmt: skip


@pytest.mark.standard_promotion
@pytest.mark.parametrize("inner", KNOWN, ids=lambda inner: inner.init.__qualname__.split(".")[0])
def test_common_states_are_known(inner):
    for transport in (gj.transport.reset(), gj.transport.rotate()):
        lens(inner, transport).init({"w": jnp.zeros(SHAPE), "b": jnp.zeros((4,))})


@pytest.mark.parametrize(
    "inner",
    [
        optax.flatten(optax.scale_by_adam()),
        optax.MultiSteps(optax.scale_by_adam(), 2).gradient_transformation(),
    ],
    ids=["flatten", "MultiSteps"],
)
@pytest.mark.standard_promotion
def test_states_of_another_structure_are_refused_by_name(inner):
    with pytest.raises(TypeError, match="align"):
        lens(inner, gj.transport.rotate()).init({"w": jnp.zeros(SHAPE), "b": jnp.zeros((4,))})


@pytest.mark.parametrize("transport", [gj.transport.rotate()], ids=repr)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda adam: optax.chain(optax.identity(), optax.chain(adam, optax.scale(1.0))),
        lambda adam: optax.masked(adam, {"w": True, "b": False}),
        lambda adam: optax.partition(
            {"one": adam, "two": optax.set_to_zero()}, {"w": "one", "b": "two"}
        ),
        lambda adam: optax.named_chain(("adam", adam)),
    ],
    ids=["chain", "masked", "partition", "named"],
)
def test_moments_are_found_inside_other_states(relaxed, wrap, transport):
    adam = optax.scale_by_adam(eps=1e-2)
    params = {"b": jnp.zeros((4,)), "w": jnp.zeros(SHAPE)}
    plain, wrapped = lens(relaxed(adam), transport), lens(relaxed(wrap(adam)), transport)
    one, other = plain.init(params), wrapped.init(params)
    first, second = jax.jit(plain.update), jax.jit(wrapped.update)
    for gradient in drifting(steps=5):
        gradient = {"w": gradient, "b": jnp.ones((4,))}
        expected, one = first(gradient, one)
        updates, other = second(gradient, other)
        np.testing.assert_allclose(updates["w"], expected["w"], atol=1e-5)


@pytest.mark.parametrize("make", [gj.transport.reset, gj.transport.rotate])
def test_transports_are_values(make):
    assert make() == make() and hash(make()) == hash(make()) and not callable(make())


@pytest.mark.parametrize("bad", [{"b1": 1.0}, {"b2": -0.1}, {"b2": 2}, {"b1": float("nan")}])
def test_rotate_checks_its_decays(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        gj.transport.rotate(**bad)


def test_reset_checks_its_option():
    with pytest.raises(ValueError, match="'median'"):
        gj.transport.reset(second="median")
