"""Which matrices are refreshed at which step, compared with a loop that just counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj
from galore_jax import projectors, refresh
from galore_jax.leaves import Leaves
from galore_jax.transforms.lenses import current_lenses

PARAMS = {
    "a": jnp.zeros((8, 6)),
    "b": jnp.zeros((3, 8, 6)),
    "bias": jnp.zeros((6,)),
    "c": jnp.zeros((2, 2, 6, 8)),
}
MATRICES = 1 + 3 + 4
PROJECTED = ("a", "b", "c")


def lens(policy, **options):
    # A basis that moves on every refresh, and an inner that remembers nothing: cheap to compile.
    defaults = {
        "projector": projectors.random_orthonormal(),
        "transport": gj.transport.reset(),
        "axes": gj.MatrixAxes(),
    }
    return gj.low_rank_projection(optax.identity(), 2, refresh=policy, **(defaults | options))


def kind(phase):
    """Matrices of one kind, for a policy that looks at no more than their places."""
    return refresh.Matrices(jnp.asarray(phase), ())


def gaussian(seed=0, params=PARAMS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def flat(tree):
    return jnp.concatenate([jnp.ravel(tree[name]) for name in PROJECTED])


def history(tx, gradients):
    """bool[steps, matrices]: was refreshed (by the count); and bool: the basis changed."""

    @jax.jit
    def run(gradients):
        def step(state, gradient):
            _, new = tx.update(gradient, state)
            counted = flat(new.refresh_state.refreshes) - flat(state.refresh_state.refreshes)
            changed = {
                name: jnp.any(new.projectors[name] != state.projectors[name], axis=(-2, -1))
                for name in PROJECTED
            }
            return new, (counted, flat(changed))

        return jax.lax.scan(step, tx.init(PARAMS), gradients)

    state, (counted, changed) = run(gradients)
    np.testing.assert_array_equal(counted, changed)
    return np.asarray(counted).astype(bool), state


def constant(steps):
    return jax.tree.map(lambda g: jnp.broadcast_to(g, (steps, *g.shape)), gaussian())


def expected(kind, gap, steps):
    table = np.zeros((steps, MATRICES), bool)
    for count in range(steps):
        for i in range(MATRICES):
            phase = 0 if kind is refresh.every else (i * gap) // MATRICES
            table[count, i] = count == 0 or count % gap == phase
    return table


@pytest.mark.parametrize(
    "kind, gap",
    [
        (refresh.every, 3),
        (refresh.staggered, 1),
        (refresh.staggered, 3),
        (refresh.staggered, 13),
    ],
)
@pytest.mark.sampled(1)
def test_due_at_the_right_counts(kind, gap):
    steps = 5 * gap + 1
    seen, state = history(lens(kind(gap)), constant(steps))
    np.testing.assert_array_equal(seen, expected(kind, gap, steps))
    np.testing.assert_array_equal(flat(state.refresh_state.refreshes), seen.sum(0))
    assert state.count == steps


@pytest.mark.parametrize("gap", [1, 2, 5, 8, 11, 200])
@pytest.mark.parametrize("batches", [[()], [(3,), ()], [(), (2, 2), (4,)], [(7,), (40,)]])
def test_staggered_does_the_work_of_every_in_even_shares(gap, batches):
    sizes = [int(np.prod(batch)) for batch in batches]
    total = sum(sizes)
    policy = refresh.staggered(gap)
    memories = [policy.init(kind(phase)) for phase in refresh.phases(batches)]
    due = np.zeros((2 * gap, total), bool)
    for count in range(1, 2 * gap + 1):
        answers = [policy.decide(jnp.int32(count), memory, None) for memory in memories]
        assert [due.shape for due, _ in answers] == batches
        assert all(new is old for (_, new), old in zip(answers, memories, strict=True))
        due[count - 1] = np.concatenate([np.ravel(due) for due, _ in answers])
    np.testing.assert_array_equal(due.sum(0), 2)  # once per period, like `every`
    assert due.sum(1).max() <= -(-total // gap)


def test_an_integer_means_every():
    one, other = (lens(gap).init(PARAMS).config for gap in (7, refresh.every(7)))
    assert one == other and one.refresh == refresh.every(7)
    assert refresh.every(7) != refresh.staggered(7)


def test_staggered_does_not_overflow():
    gap, total = 100_000, 1_000_000
    last = kind(refresh.phases([(total,)])[0][-1])
    policy = refresh.staggered(gap)
    assert policy.decide(jnp.int32(gap - 1), policy.init(last), None)[0]
    assert not policy.decide(jnp.int32(gap - 2), policy.init(last), None)[0]


def spoil(gradients, step, name, index, value):
    leaf = gradients[name]
    return gradients | {name: leaf.at[(step, *index)].set(value)}


@pytest.mark.parametrize("kind, value", [(refresh.every, jnp.nan), (refresh.staggered, -jnp.inf)])
@pytest.mark.sampled(1)
def test_a_gradient_that_is_not_finite_keeps_its_basis_and_tries_again(kind, value):
    gap, steps = 4, 13
    gradients = constant(steps)
    # One entry of matrix 1 of `b` at a step where it is due, and again one step later; matrix 3
    # of `c` at count 0; and `a` at a step at which it is not due, which must not matter.
    policy = kind(gap)
    clean = expected(kind, gap, steps)
    due_b = int(np.flatnonzero(clean[1:, 2])[0]) + 1
    gradients = spoil(gradients, due_b, "b", (1, 3, 2), value)
    gradients = spoil(gradients, due_b + 1, "b", (1, 7, 5), value)
    gradients = spoil(gradients, 0, "c", (1, 1, 0, 0), value)
    gradients = spoil(gradients, 2, "a", (4, 4), value)
    table = clean.copy()
    table[due_b, 2], table[due_b + 1, 2], table[due_b + 2, 2] = False, False, True
    table[0, 7], table[1, 7] = False, True
    seen, _ = history(lens(policy), gradients)
    np.testing.assert_array_equal(seen, table)


def test_a_zero_gradient_keeps_the_basis_and_tries_again():
    gradients = constant(9)
    gradients = spoil(gradients, 0, "a", (), 0)
    gradients = spoil(gradients, 4, "b", (2,), 0)
    gradients = spoil(gradients, 5, "b", (2,), 0)
    table = expected(refresh.every, 4, 9)
    table[0, 0], table[1, 0] = False, True
    table[4, 3], table[6, 3] = False, True
    seen, _ = history(lens(4), gradients)
    np.testing.assert_array_equal(seen, table)


@pytest.mark.sampled(2)
def test_no_projector_makes_a_basis_of_an_unusable_gradient(projector):
    params = {"w": jnp.zeros((4, 8, 6))}
    tx = lens(3, projector=projector, transport=gj.transport.align())
    update = jax.jit(tx.update)
    good = gaussian(params=params)
    bad = {"w": good["w"].at[1].set(jnp.nan).at[2].set(0).at[3, 0, 0].set(jnp.inf)}
    start = tx.init(params)
    eye = np.eye(6, 2)
    np.testing.assert_array_equal(start.projectors["w"], np.stack([eye] * 4))
    _, first = update(bad, start)
    np.testing.assert_array_equal(first.projectors["w"][1:], np.stack([eye] * 3))
    np.testing.assert_array_equal(first.refresh_state.refreshes["w"], [1, 0, 0, 0])
    np.testing.assert_array_equal(first.refresh_state.due["w"], [False, True, True, True])
    _, second = update(good, first)
    np.testing.assert_array_equal(second.projectors["w"][0], first.projectors["w"][0])
    np.testing.assert_array_equal(second.refresh_state.refreshes["w"], [1, 1, 1, 1])
    for moved in np.asarray(second.projectors["w"]):
        assert np.any(moved != eye)
        np.testing.assert_allclose(moved.T @ moved, np.eye(2), atol=1e-5)


def test_a_gradient_that_is_not_finite_still_reaches_the_inner():
    tx = lens(1)
    gradient = gaussian()
    gradient["a"] = gradient["a"].at[0, 0].set(jnp.nan)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(PARAMS))
    assert np.isnan(updates["a"]).any()
    assert all(np.isfinite(updates[name]).all() for name in ("b", "bias", "c"))


def test_the_basis_comes_from_the_current_gradient():
    """Refresh before projection: a rank-2 gradient of this very step is reproduced."""
    rng = np.random.default_rng(3)
    params = {"w": jnp.zeros((8, 6))}
    tx = lens(1, projector=projectors.svd())
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
        low_rank = rng.normal(size=(8, 2)) @ rng.normal(size=(2, 6))
        gradient = {"w": jnp.asarray(low_rank, jnp.float32)}
        updates, state = update(gradient, state)
        np.testing.assert_allclose(updates["w"], gradient["w"], atol=1e-4)


def test_separate_layers_take_turns_as_stacked_ones_do():
    """Flags of equal layers lie in one array: each leaf has to read its own."""
    tx = gj.low_rank_projection(
        optax.trace(0.9), 3, projector=projectors.svd(), axes=gj.MatrixAxes(-2, -1),
        refresh=refresh.staggered(4),
    )  # fmt: skip
    stacked = {"layers": {"w": jnp.ones((4, 8, 6))}}
    separate = {"layers": {str(n): {"w": jnp.ones((8, 6))} for n in range(4)}}
    states, update = [tx.init(stacked), tx.init(separate)], jax.jit(tx.update)
    for step in range(6):
        gradient = jax.random.normal(jax.random.key(step), (4, 8, 6))
        together, states[0] = update({"layers": {"w": gradient}}, states[0], stacked)
        alone = {"layers": {str(n): {"w": gradient[n]} for n in range(4)}}
        apart, states[1] = update(alone, states[1], separate)
        for n in range(4):
            np.testing.assert_allclose(
                apart["layers"][str(n)]["w"], together["layers"]["w"][n], rtol=1e-5, atol=1e-7
            )


def test_every_leaf_reads_its_own_flags():
    params = {"layers": {str(n): {"w": jnp.ones((8, 6))} for n in range(12)}}
    state = gj.low_rank_projection(optax.trace(0.9), 3).init(params)
    leaves = Leaves.of(params)
    ((_, lens, owners),) = current_lenses(state, leaves)
    (name,) = lens.kinds
    flags = lens.per_leaf({name: jnp.arange(12)})
    assert [leaves.paths[owner] for owner in owners] == leaves.paths
    assert list(map(int, flags)) == list(range(12))
