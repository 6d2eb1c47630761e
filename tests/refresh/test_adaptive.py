"""`refresh.adaptive`: gaps that grow where the subspace holds still, and only there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax as gj
from galore_jax import projectors, refresh
from galore_jax.refresh.adaptive import first_cosine
from galore_jax.transforms.subspace import overlap

# Construction

REFUSED = {
    "gap zero": ({"gap": 0}, ValueError, "gap"),
    "gap float": ({"gap": 2.0}, TypeError, "gap"),
    "gap bool": ({"gap": True}, TypeError, "gap"),
    "threshold zero": ({"threshold": 0.0}, ValueError, "`threshold`.*0.0"),
    "threshold above one": ({"threshold": 1.1}, ValueError, "`threshold`.*1.1"),
    "threshold nan": ({"threshold": float("nan")}, ValueError, "`threshold`.*nan"),
    "patience zero": ({"patience": 0}, ValueError, "`patience`.*0"),
    "patience float": ({"patience": 2.0}, TypeError, "`patience`.*2.0"),
    "patience bool": ({"patience": True}, TypeError, "`patience`.*True"),
    "growth one": ({"growth": 1.0}, ValueError, "`growth`.*1.0"),
    "growth nan": ({"growth": float("nan")}, ValueError, "`growth`.*nan"),
    "max_gap zero": ({"max_gap": 0}, ValueError, "gap"),
    "max_gap float": ({"max_gap": 400.0}, TypeError, "gap"),
    "max_gap below the gap": ({"max_gap": 9}, ValueError, "`max_gap` 9.*10"),
    "mode": ({"mode": "angle"}, ValueError, "'overlap'.*'cosine'.*'angle'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused_by_name(name):
    options, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        refresh.adaptive(**({"gap": 10} | options))


def test_bounds_themselves_are_allowed():
    refresh.adaptive(1, threshold=1.0, patience=1, growth=1.01, max_gap=1)


def test_it_is_static_hashable_and_comparable():
    assert refresh.adaptive(10) == refresh.adaptive(10) != refresh.adaptive(10, threshold=0.5)
    assert hash(refresh.adaptive(10)) == hash(refresh.adaptive(10))
    assert repr(refresh.adaptive(10, max_gap=40)).startswith("adaptive(gap=10, threshold=0.6")


MOVING_COLUMNS = [
    (projectors.svd(), gj.transport.align()),
    (projectors.randomized_svd(), gj.transport.reset()),
    (projectors.randomized_svd(), gj.transport.align()),
    (projectors.subspace_iteration(), gj.transport.rotate()),
]
FIXED_COLUMNS = [
    (projectors.svd(), gj.transport.keep()),
    (projectors.svd(), gj.transport.rotate()),
    (projectors.gram_eigh(), gj.transport.reset()),
]


@pytest.mark.parametrize(("projector", "transport"), MOVING_COLUMNS, ids=repr)
def test_cosine_needs_columns_that_stay_in_their_places(projector, transport):
    def lens(mode):
        gj.low_rank_projection(
            optax.trace(0.9), 2, projector=projector, transport=transport,
            refresh=refresh.adaptive(10, mode=mode),
        )  # fmt: skip

    with pytest.raises(ValueError, match=r'columns.*mode="overlap"'):
        lens("cosine")
    lens("overlap")


@pytest.mark.parametrize(("projector", "transport"), FIXED_COLUMNS, ids=repr)
def test_cosine_is_taken_where_they_do(projector, transport):
    gj.low_rank_projection(
        optax.trace(0.9), 2, projector=projector, transport=transport,
        refresh=refresh.adaptive(10, mode="cosine"),
    )  # fmt: skip


def test_an_integer_gap_of_q_galore_is_adaptive():
    policy = gj.q_galore_adamw8bit(1e-2, update_proj_gap=70).init({})[0].config.refresh
    assert policy == refresh.adaptive(70)
    given = gj.q_galore_adamw8bit(1e-2, update_proj_gap=refresh.every(70)).init({})
    assert given[0].config.refresh == refresh.every(70)


# The measures


def orthonormal(seed, *shape):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=shape))[0].astype(np.float32)


def test_overlap_of_a_subspace_with_itself_is_one_whatever_its_basis():
    one = orthonormal(0, 5, 30, 4)
    turned = one @ orthonormal(1, 5, 4, 4)
    assert np.max(np.abs(one - turned)) > 0.1
    np.testing.assert_allclose(overlap(one, turned), 1, atol=1e-5)
    np.testing.assert_allclose(overlap(one, -one), 1, atol=1e-5)


def test_overlap_knows_nothing_of_signs_and_rotations():
    one, other = orthonormal(0, 5, 30, 4), orthonormal(1, 5, 30, 4)
    turns = orthonormal(2, 5, 4, 4), orthonormal(3, 5, 4, 4)
    np.testing.assert_allclose(
        overlap(one @ turns[0], -other @ turns[1]), overlap(one, other), atol=1e-6
    )
    np.testing.assert_allclose(overlap(other, one), overlap(one, other), atol=1e-6)


def test_overlap_of_random_subspaces_is_rank_over_dimension():
    one, other = orthonormal(0, 400, 30, 6), orthonormal(1, 400, 30, 6)
    seen = np.asarray(overlap(one, other))
    assert seen.shape == (400,)
    assert abs(np.mean(seen) - 6 / 30) < 5 * np.std(seen) / 20


def test_overlap_is_the_share_of_common_directions():
    basis = orthonormal(0, 12, 9)
    for common in range(5):
        other = np.concatenate([basis[:, :common], basis[:, 4 : 8 - common]], axis=1)
        assert other.shape == (12, 4)
        np.testing.assert_allclose(overlap(basis[:, :4], other), common / 4, atol=1e-6)


def test_cosine_is_that_of_the_first_columns_without_its_sign():
    one, other = orthonormal(0, 7, 30, 4), orthonormal(1, 7, 30, 4)
    expected = np.abs(np.sum(one[:, :, 0] * other[:, :, 0], axis=1))
    np.testing.assert_allclose(first_cosine(one, other), expected, atol=1e-6)
    np.testing.assert_allclose(first_cosine(-one, other), expected, atol=1e-6)


# The rule, with bases of our making


def of_one_kind(*batch):
    (phase,) = refresh.phases([batch])
    return refresh.Matrices(jnp.asarray(phase), ())


def refreshed(similarity, moved=True, refreshes=2):
    """A step that found this similarity."""
    moved, refreshes = jnp.asarray(moved), jnp.asarray(refreshes)
    similarity = jnp.asarray(similarity, jnp.float32)
    return refresh.Observation(moved, moved & (refreshes > 1), refreshes, similarity, ())


def drive(policy, similarity_at, steps, matrices=1, fails_at=()):
    """``bool[steps, matrices]``: who was refreshed when, and the memory at the end.

    The loop of the lens, without a lens: a scan over steps with one leaf of `matrices`.

    Args:
      similarity_at: ``float[steps, matrices]``, the overlap that a refresh finds.
      fails_at: Steps at which the gradient of every matrix is unusable.
    """

    def step(carry, given):
        due, refreshes, memory = carry
        count, similarity, fails = given
        moved = due & ~fails
        refreshes = refreshes + moved.astype(jnp.int32)
        seen = refresh.Observation(
            moved, moved & (refreshes > 1), refreshes, jnp.where(moved, similarity, 0), ()
        )
        planned, memory = policy.decide(count + 1, memory, seen)
        return (planned | (due & ~moved), refreshes, memory), moved

    start = (
        jnp.ones(matrices, bool),
        jnp.zeros(matrices, jnp.int32),
        policy.init(of_one_kind(matrices)),
    )
    fails = np.zeros(steps, bool)
    fails[list(fails_at)] = True
    given = jnp.arange(steps, dtype=jnp.int32), jnp.asarray(similarity_at, jnp.float32), fails
    (_, _, memory), moved = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(start, given)
    return np.asarray(moved), memory


def rule(policy, similarity_at, fails_at=()):
    """The documented rule for one matrix, in Python."""
    gap, latest, done, pending, moved = policy.gap, [], 0, True, []
    for step, similarity in enumerate(similarity_at):
        now = (pending or step % gap == 0) and step not in fails_at
        pending = (pending or step % gap == 0) and not now
        moved.append(now)
        if not now:
            continue
        done += 1
        if done == 1:
            continue  # the initial basis means nothing
        latest = [*latest, similarity][-policy.patience :]
        if len(latest) == policy.patience and np.mean(latest) >= policy.threshold:
            gap = max(gap, int(min(gap * policy.growth, policy.max_gap or 2**30)))
    return np.array(moved), gap, latest


RULES = [
    refresh.adaptive(3),
    refresh.adaptive(1, threshold=0.5, patience=1),
    refresh.adaptive(2, threshold=0.6, patience=3, growth=1.5, max_gap=30),
    refresh.adaptive(4, threshold=0.8, patience=2, growth=3.0),
    refresh.adaptive(8, threshold=0.5, patience=4, growth=1.3),
]


@pytest.mark.parametrize("policy", RULES, ids=repr)
def test_the_rule_is_the_rule(policy):
    """Against Python, over random similarities whose level wanders, with failures."""
    steps, matrices = 250, 12
    rng = np.random.default_rng(0)
    level = np.repeat(rng.uniform(0.1, 0.95, size=(5, matrices)), steps // 5, axis=0)
    similarity = np.clip(level + 0.15 * rng.normal(size=level.shape), 0, 1)
    fails_at = set(rng.choice(steps, size=40, replace=False)) | {0}
    seen, memory = drive(policy, similarity, steps, matrices, sorted(fails_at))
    gaps = []
    for matrix in range(matrices):
        moved, gap, latest = rule(policy, similarity[:, matrix], fails_at)
        np.testing.assert_array_equal(seen[:, matrix], moved, err_msg=str(matrix))
        assert int(memory.gap[matrix]) == gap
        kept = np.asarray(memory.similarities[matrix])
        assert not np.any(kept[: policy.patience - len(latest)] >= 0)  # no similarity yet
        np.testing.assert_allclose(kept[policy.patience - len(latest) :], latest, atol=1e-5)
        gaps.append(gap)
    assert len(set(gaps)) > 1, "the matrices were to differ"


def test_the_schedule_of_the_reference():
    """What its code does in 20,000 steps: 11 factorizations of a leaf that is always still, 100 of
    one that never is."""
    policy = refresh.adaptive(200, threshold=0.4, patience=5, growth=2)
    steps = 20_000
    similarity = np.broadcast_to([0.9, 0.1], (steps, 2))
    seen, memory = drive(policy, similarity, steps, 2)
    expected = [0, 200, 400, 600, 800, 1000, 1200, 1600, 3200, 6400, 12800]
    np.testing.assert_array_equal(np.flatnonzero(seen[:, 0]), expected)
    np.testing.assert_array_equal(np.flatnonzero(seen[:, 1]), np.arange(0, steps, 200))
    assert [int(gap) for gap in memory.gap] == [12800, 200]


def test_the_longest_gap_holds():
    policy = refresh.adaptive(10, patience=1, growth=3, max_gap=40)
    seen, memory = drive(policy, np.ones((400, 1)), 400)
    np.testing.assert_array_equal(np.flatnonzero(seen[:, 0]), [0, 10, 30, *range(40, 400, 40)])
    assert int(memory.gap[0]) == 40


def test_a_short_gap_grows_by_whatever_factor_is_accepted():
    policy = refresh.adaptive(5, patience=1, growth=1.1)
    _, memory = drive(policy, np.ones((200, 1)), 200)
    assert int(memory.gap[0]) > 5


def test_a_gap_that_grows_for_ever_does_not_overflow():
    for first, last in [(2**29, 2**30), (2**31 - 1, 2**31 - 1)]:
        policy = refresh.adaptive(first, patience=1, growth=2.0)
        memory = policy.init(of_one_kind())
        for _ in range(5):
            _, memory = policy.decide(jnp.int32(7), memory, refreshed(0.9))
        assert int(memory.gap) == last


def test_the_first_refresh_and_steps_without_one_do_not_count():
    policy = refresh.adaptive(5, patience=1)
    memory = policy.init(of_one_kind(3))
    seen = refreshed([0.9, 0.9, 0.9], moved=[True, False, True], refreshes=[1, 2, 2])
    _, after = policy.decide(jnp.int32(1), memory, seen)
    np.testing.assert_array_equal(after.gap, [5, 5, 10])
    np.testing.assert_array_equal(after.similarities[:, 0] >= 0, [False, False, True])


def test_cosine_compares_first_columns_only():
    """The same subspace with its columns exchanged: overlap one, cosine zero."""
    basis = orthonormal(0, 6, 2)
    for mode, expected in (("overlap", 1), ("cosine", 0)):
        similarity = refresh.adaptive(5, mode=mode).similarity or overlap
        np.testing.assert_allclose(similarity(basis, basis[:, ::-1]), expected, atol=1e-6)
        np.testing.assert_allclose(similarity(basis, -basis), 1, atol=1e-6)  # signs mean nothing


# In a lens


def lens(policy, rank=3, **options):
    defaults = {"axes": gj.MatrixAxes(), "transport": gj.transport.reset()}
    return gj.low_rank_projection(optax.identity(), rank, refresh=policy, **(defaults | options))


def low_rank(rng, *shape, rank=3):
    return rng.normal(size=(*shape[:-1], rank)) @ rng.normal(size=(*shape[:-2], rank, shape[-1]))


def history(tx, grads):
    """Refreshes and bases after every step, and the last state; `grads` are stacked over steps."""
    params = jax.tree.map(lambda g: g[0], grads)

    @jax.jit
    def run(grads):
        def step(state, grad):
            _, state = tx.update(grad, state)
            return state, (state.refresh_state.refreshes, state.projectors)

        return jax.lax.scan(step, tx.init(params), grads)

    return run(grads)


def still_and_moving(steps, seed=0):
    """``[steps, 2, 20, 16]``: layer 0 keeps its subspace, layer 1 has another one at every step."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(3, 16))
    still = rng.normal(size=(steps, 20, 3)) @ basis
    return jnp.asarray(np.stack([still, low_rank(rng, steps, 20, 16)], axis=1), jnp.float32)


POLICY = refresh.adaptive(2, patience=2)
STEPS = 40
CHOICES = {
    "svd": {"projector": projectors.svd()},
    "randomized, align": {"transport": gj.transport.align()},  # the default projector
}


@pytest.mark.parametrize("name", CHOICES)
def test_saves_most_where_the_subspace_stays_and_nothing_where_it_moves(name):
    grads = {"w": still_and_moving(STEPS)}
    state, (refreshes, bases) = history(lens(POLICY, **CHOICES[name]), grads)
    refreshes, bases = np.asarray(refreshes["w"]), np.asarray(bases["w"])
    np.testing.assert_array_equal(refreshes[-1], state.refresh_state.refreshes["w"])
    moved = np.diff(refreshes, axis=0, prepend=0) == 1
    # 0, 2, 4: two comparisons; then 8, 16, 32
    np.testing.assert_array_equal(np.flatnonzero(moved[:, 0]), [0, 2, 4, 8, 16, 32])
    assert np.sum(moved[:, 1]) >= 0.95 * STEPS / POLICY.gap
    assert list(np.asarray(state.refresh_state.memory["w"].gap)) == [32, 2]
    seen = np.asarray(state.refresh_state.memory["w"].similarities)
    assert np.all(seen[0] > 0.99) and np.all(seen[1] < POLICY.threshold)
    # Only what is due is factored: the other layer of the stack keeps every bit.
    changed = np.any(np.diff(bases, axis=0) != 0, axis=(2, 3))
    assert not np.any(changed & ~moved[1:])
    np.testing.assert_array_equal(changed[:, 1], moved[1:, 1])


@pytest.mark.parametrize(("rank", "size"), [(4, 32), (12, 32)])
def test_fresh_random_subspaces_save_almost_nothing(rank, size):
    """With the default projector, which starts from the old basis, and bases in INT4."""
    rng = np.random.default_rng(1)
    grads = {"w": jnp.asarray(low_rank(rng, 60, 40, size, rank=rank), jnp.float32)}
    tx = lens(refresh.adaptive(2), rank, transport=gj.transport.align(), codec=gj.codecs.int4())
    state, _ = history(tx, grads)
    assert int(state.refresh_state.refreshes["w"]) >= 0.95 * 30
    assert np.mean(state.refresh_state.memory["w"].similarities) < rank / size + 0.15


def test_a_still_subspace_is_recognised_through_int4():
    rng = np.random.default_rng(2)
    grads = rng.normal(size=(64, 40, 8)) @ rng.normal(size=(8, 32))
    tx = lens(refresh.adaptive(2), 8, transport=gj.transport.align(), codec=gj.codecs.int4())
    state, _ = history(tx, {"w": jnp.asarray(grads, jnp.float32)})
    # 0, 2, ..., 10; 12, 16, 32: nine instead of thirty-two
    assert int(state.refresh_state.refreshes["w"]) == 9


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_failed_refresh_is_tried_again_and_not_compared(bad):
    grads = np.array(still_and_moving(12)[:, :1])
    failing = [4, 5]
    grads[failing, 0] = 0 if bad == 0 else grads[failing, 0]
    grads[failing, 0, 0, 0] = bad
    tx = lens(refresh.adaptive(2, patience=4), projector=projectors.svd())
    state, (refreshes, _) = history(tx, {"w": jnp.asarray(grads)})
    moved = np.flatnonzero(np.diff(np.asarray(refreshes["w"])[:, 0], prepend=0))
    # 4 fails, so does 5; 6 is due anyway. Comparisons at 2, 6, 8, 10: then the gap grows.
    np.testing.assert_array_equal(moved, [0, 2, 6, 8, 10])
    assert int(state.refresh_state.memory["w"].gap[0]) == 4
    assert np.all(np.asarray(state.refresh_state.memory["w"].similarities) > 0.99)


def test_a_retry_between_two_multiples_is_compared_like_any_other():
    grads = np.array(still_and_moving(12)[:, :1])
    grads[[0, 4], 0, 3, 3] = np.nan
    tx = lens(refresh.adaptive(4, patience=1), projector=projectors.svd())
    state, (refreshes, _) = history(tx, {"w": jnp.asarray(grads)})
    moved = np.flatnonzero(np.diff(np.asarray(refreshes["w"])[:, 0], prepend=0))
    # The first one succeeds at 1 and is compared with nothing; 5 grows the gap to 8, 8 to 16.
    np.testing.assert_array_equal(moved, [1, 5, 8])
    assert int(state.refresh_state.memory["w"].gap[0]) == 16


def test_state_is_a_fixed_point_and_nothing_is_traced_again():
    tx, traces = lens(POLICY, projector=projectors.svd()), []
    grads = still_and_moving(6)

    @jax.jit
    def step(grad, state):
        traces.append(None)
        return tx.update(grad, state)

    def signature(tree):
        leaves, treedef = jax.tree.flatten(tree)
        return treedef, [(x.shape, x.dtype, jax.typeof(x).weak_type) for x in leaves]

    state = tx.init({"w": grads[0], "bias": jnp.zeros(3)})
    before = signature(state)
    for grad in grads:
        _, state = step({"w": grad, "bias": jnp.ones(3)}, state)
        assert signature(state) == before
    assert len(traces) == 1
    assert all(leaf.size > 0 for leaf in jax.tree.leaves(state))


def test_the_state_is_finite_from_the_start():
    """`jax_debug_nans` is for looking at a user's model, and other laws want finite states."""
    tx, grads = lens(POLICY, projector=projectors.svd()), still_and_moving(2)
    with jax.debug_nans(True):
        state = tx.init({"w": grads[0]})
        for grad in grads:
            _, state = jax.jit(tx.update)({"w": grad}, state)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
