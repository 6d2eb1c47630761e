"""The NumPy twin agrees with the released PyTorch code, and with itself."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from . import numpy_galore as twin

with np.load(Path(__file__).with_name("torch_trajectories.npz")) as _file:
    RECORDED = dict(_file)
META = json.loads(str(RECORDED["meta"]))
CASES = META["cases"]
KERNEL = (7, 5)


def torch_adam(config):
    return twin.adam(config["b1"], config["b2"], config["eps"], eps_before_correction=True)


def with_signs_of(bases):
    """The exact SVD with the signs of recorded columns, one recording per refresh."""
    bases = iter(bases)

    def basis_of(grad, rank, axis):
        basis = twin.singular_vectors(grad, rank, axis)
        return basis * np.sign(np.sum(basis * next(bases), axis=0))

    return basis_of


def replay(name, inner=None, **changes):
    """The twin's weights in the place of the recorded ones, in PyTorch's `[out, in]`."""
    config = CASES[name]
    options = {k: config[k] for k in ("side", "gap", "scale", "lr", "weight_decay")}
    if config["family"] == "kept":
        options["basis_of"] = with_signs_of(RECORDED[f"bases/{name}"])
    weights, _ = twin.run(
        RECORDED[f"weight/{config['shape']}"].T,
        RECORDED[f"grads/{config['shape']}"].transpose(0, 2, 1),
        config["rank"],
        inner or torch_adam(config),
        **(options | {"decay_after": True} | changes),
    )
    return weights.transpose(0, 2, 1)


def error(name, *args, **changes):
    return np.max(np.abs(replay(name, *args, **changes) - RECORDED[f"weights/{name}"]))


@pytest.mark.parametrize("name", CASES)
def test_reproduces_released_code(name):
    assert error(name) < 1e-5


def test_trajectories_cover_every_combination():
    seen = {(c["family"], c["shape"], c["proj_type"]) for c in CASES.values()}
    everything = {
        (family, shape, proj_type)
        for family in ("within", "across")
        for shape in META["shapes"]
        for proj_type in ("std", "reverse_std", "left", "right")
    }
    assert everything <= seen
    for family in ("within", "across"):
        numbers = {(c["scale"], c["weight_decay"]) for c in CASES.values() if c["family"] == family}
        assert len(numbers) == 4


def test_std_is_short_and_reverse_std_is_long_except_on_squares():
    for config in CASES.values():
        kernel = META["shapes"][config["shape"]][::-1]
        named = {"std": "short", "reverse_std": "long"}.get(config["proj_type"])
        if named is None:
            continue
        axis = twin.projected_axis(kernel, named)
        agrees = axis == twin.projected_axis(kernel, config["side"])
        assert agrees == ((config["shape"], named) != ("square", "long"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("within-tall-std-r4", {"side": "output"}),
        ("within-square-std-r4", {"side": "output"}),
        ("within-wide-std-r4", {"decay_after": False}),
        ("within-tall-std-r4", {"inner": twin.adam(0.9, 0.999, 1e-3)}),
        ("across-tall-std-r4", {"gap": 1000}),
        ("kept-tall-std-r4", {"transport": "reset"}),
        ("kept-tall-std-r4", {"transport": "rotate"}),
        ("kept-tall-std-r4", {"basis_of": lambda g, r, a: -twin.singular_vectors(g, r, a)}),
    ],
)
def test_trajectories_tell_wrong_code_from_right(name, changes):
    """Without the deviation each case agrees, see above, and with it the error is plain."""
    inner = changes.get("inner")
    options = {k: v for k, v in changes.items() if k != "inner"}
    if "basis_of" in options:
        signs = iter((1, -1, 1, -1))
        flipping = options["basis_of"]
        options["basis_of"] = lambda g, r, a: next(signs) * flipping(g, r, a)
    if "decay_after" in options:
        assert CASES[name]["weight_decay"] > 0
    assert error(name, inner, **options) > 1e-4


INNERS = {
    "sgd": twin.sgd(),
    "trace": twin.trace(0.9),
    "lion": twin.lion(),
    "adam": twin.adam(0.9, 0.99, 1e-6),
}


def gradients(steps, shape=KERNEL, seed=0):
    return np.random.default_rng(seed).normal(size=(steps, *shape))


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("sgd", optax.identity()),
        ("trace", optax.trace(0.9)),
        ("lion", optax.scale_by_lion()),
        ("adam", optax.scale_by_adam(0.9, 0.99, 1e-6)),
    ],
)
def test_inners_follow_optax(name, theirs):
    state, their_state = INNERS[name].init(KERNEL), theirs.init(jnp.zeros(KERNEL))
    for grad in gradients(6):
        direction, state = INNERS[name].update(grad, state)
        expected, their_state = theirs.update(jnp.asarray(grad, jnp.float32), their_state)
        np.testing.assert_allclose(direction, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_long_side_and_keep_are_the_galore_of_optax_contrib(shape):
    def basis_of(grad, rank, axis):
        # float32 by the same routine, because `keep` depends on the signs
        u, _, vt = jnp.linalg.svd(jnp.asarray(grad, jnp.float32), full_matrices=False)
        return np.asarray(u[:, :rank] if axis == 0 else vt[:rank].T, np.float64)

    grads, start = gradients(9, shape), gradients(1, shape, seed=1)[0]
    ours, _ = twin.run(
        start, grads, 3, twin.adam(),
        gap=4, scale=0.5, side="long", lr=0.1, weight_decay=0.1, basis_of=basis_of,
    )  # fmt: skip
    theirs = optax.contrib.galore(0.1, rank=3, update_proj_gap=4, scale=0.5, weight_decay=0.1)
    weight = jnp.asarray(start, jnp.float32)
    state = theirs.init(weight)
    for grad, expected in zip(grads, ours, strict=True):
        update, state = theirs.update(jnp.asarray(grad, jnp.float32), state, weight)
        weight = optax.apply_updates(weight, update)
        np.testing.assert_allclose(weight, expected, atol=1e-4)


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("side", ["short", "long", "input", "output"])
def test_updates_lie_in_the_span_of_the_basis(inner, side):
    optimizer = twin.Galore(KERNEL, 3, INNERS[inner], gap=2, side=side, transport="align", lr=0.1)
    weight = np.zeros(KERNEL)
    for grad in gradients(5):
        after = optimizer.step(weight, grad)
        p = optimizer.basis
        moved = after - weight if optimizer.axis == 0 else (after - weight).T
        np.testing.assert_allclose(p.T @ p, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(p @ (p.T @ moved), moved, atol=1e-12)
        weight = after


@pytest.mark.parametrize("inner", INNERS)
def test_transposing_the_problem_swaps_the_sides(inner):
    grads, start = gradients(7), gradients(1, seed=1)[0]
    options = dict(gap=3, lr=0.1, weight_decay=0.1, scale=0.5)

    def like_the_other(grad, rank, axis):
        # the SVD of the transpose is free to return other signs
        return twin.singular_vectors(grad.T, rank, 1 - axis)

    one, _ = twin.run(start, grads, 3, INNERS[inner], side="input", **options)
    other, _ = twin.run(
        start.T, grads.transpose(0, 2, 1), 3, INNERS[inner],
        side="output", basis_of=like_the_other, **options,
    )  # fmt: skip
    np.testing.assert_allclose(one, other.transpose(0, 2, 1), atol=1e-12)


def test_no_rank_left_to_save_means_the_plain_inner_without_scale():
    grads, start = gradients(6), np.ones(KERNEL)
    weights, optimizer = twin.run(start, grads, 99, twin.sgd(), lr=0.1, scale=0.25)
    np.testing.assert_allclose(weights, start - 0.1 * np.cumsum(grads, axis=0), atol=1e-12)
    assert optimizer.full and optimizer.rank == 5


def test_long_side_at_full_kept_rank_loses_nothing_on_a_refresh():
    grads = gradients(4)
    weights, optimizer = twin.run(
        np.zeros(KERNEL), grads, 99, twin.sgd(), lr=0.1, gap=1, side="long"
    )
    np.testing.assert_allclose(weights, -0.1 * np.cumsum(grads, axis=0), atol=1e-12)
    assert optimizer.basis.shape == (7, 5) and not optimizer.full


def test_rank_is_capped_and_sides_follow_the_shape():
    assert [twin.projected_axis((7, 5), s) for s in ("short", "long", "input", "output")] == [
        1, 0, 0, 1,
    ]  # fmt: skip
    assert twin.projected_axis((5, 5), "short") == twin.projected_axis((5, 5), "long") == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_useless_gradient_keeps_the_basis_and_retries_on_the_next_step(bad):
    grads = gradients(8)
    grads[4] = 0.0
    grads[4, 0, 0] = bad
    optimizer = twin.Galore(KERNEL, 2, twin.sgd(), gap=4)
    bases, due = [], []
    for grad in grads:
        optimizer.step(np.zeros(KERNEL), grad)
        bases.append(optimizer.basis)
        due.append(optimizer.due)
    assert bases[4] is bases[0] and due[4]
    np.testing.assert_array_equal(bases[5], twin.singular_vectors(grads[5], 2, 1))
    assert bases[7] is bases[5] and not due[5]
    assert np.all(np.isfinite(bases[5]))


def test_first_basis_is_the_identity_until_a_gradient_comes():
    optimizer = twin.Galore(KERNEL, 2, twin.sgd())
    optimizer.step(np.zeros(KERNEL), np.zeros(KERNEL))
    np.testing.assert_array_equal(optimizer.basis, np.eye(5, 2))


def test_aligned_is_the_closest_basis_of_the_same_span():
    rng = np.random.default_rng(0)
    old, new = (np.linalg.qr(rng.normal(size=(9, 4)))[0] for _ in range(2))
    best = twin.aligned(new, old)
    np.testing.assert_allclose(best @ best.T, new @ new.T, atol=1e-12)
    distance = np.linalg.norm(best - old)
    for _ in range(50):
        other = new @ np.linalg.qr(rng.normal(size=(4, 4)))[0]
        assert distance <= np.linalg.norm(other - old)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    np.testing.assert_allclose(twin.aligned(old @ turn, old), old, atol=1e-12)


@pytest.mark.parametrize("transport", ["align", "rotate"])
def test_signs_of_the_new_basis_do_not_matter_to_a_transport_that_looks_at_both(transport):
    def run(flip):
        rng = np.random.default_rng(3)

        def basis_of(grad, rank, axis):
            basis = twin.singular_vectors(grad, rank, axis)
            return basis * rng.choice([-1, 1], size=rank) if flip else basis

        options = dict(gap=3, lr=0.1, transport=transport, basis_of=basis_of)
        return twin.run(np.zeros(KERNEL), gradients(10), 3, INNERS["adam"], **options)[0]

    np.testing.assert_allclose(run(True), run(False), atol=1e-10)


def adam_state(seed=0, shape=(6, 3), steps=5):
    inner = twin.adam(0.9, 0.99)
    state = inner.init(shape)
    for grad in gradients(steps, shape, seed):
        _, state = inner.update(grad, state)
    return state


def test_rotate_by_a_signed_permutation_permutes_the_moments():
    state, p = adam_state(), np.eye(5, 3)
    turn = np.array([[0, -1, 0], [0, 0, 1], [1, 0, 0]])
    moved = twin.rotated(state, p @ turn, p, 0.9, 0.99)
    np.testing.assert_allclose(moved["mu"], state["mu"] @ turn, atol=1e-12)
    np.testing.assert_allclose(moved["nu"], state["nu"] @ np.abs(turn), atol=1e-12)
    assert moved["count"] == state["count"]


def test_rotate_into_an_unseen_subspace_leaves_the_row_means_of_the_second_moment():
    state, p = adam_state(), np.eye(8, 6)
    moved = twin.rotated(state, p[:, 3:], p[:, :3], 0.9, 0.99)
    np.testing.assert_array_equal(moved["mu"], 0)
    means = state["nu"].mean(axis=1, keepdims=True)
    np.testing.assert_allclose(moved["nu"], np.broadcast_to(means, (6, 3)), atol=1e-12)


def test_rotate_spelled_out_entry_by_entry():
    rng = np.random.default_rng(4)
    old, new = (np.linalg.qr(rng.normal(size=(7, 3)))[0] for _ in range(2))
    state, (b1, b2, t) = adam_state(), (0.9, 0.99, 5)
    moved = twin.rotated(state, new, old, b1, b2)
    for row in range(6):
        m, v = state["mu"][row], state["nu"][row]
        for i in range(3):
            c = [float(new[:, i] @ old[:, j]) for j in range(3)]
            mean = sum(c[j] * m[j] for j in range(3))
            variance = sum(
                c[j] ** 2 * (v[j] / (1 - b2**t) - (m[j] / (1 - b1**t)) ** 2) for j in range(3)
            )
            second = abs(variance + (mean / (1 - b1**t)) ** 2) * (1 - b2**t)
            floor = (1 - sum(x * x for x in c)) * sum(v) / 3
            assert moved["mu"][row, i] == pytest.approx(mean)
            assert moved["nu"][row, i] == pytest.approx(second + floor)


def test_reset_forgets_the_moments_but_not_the_count():
    optimizer = twin.Galore(KERNEL, 3, INNERS["adam"], gap=4, transport="reset")
    grads = gradients(5)
    for grad in grads:
        optimizer.step(np.zeros(KERNEL), grad)
    low = grads[4] @ optimizer.basis
    np.testing.assert_allclose(optimizer.state["mu"], 0.1 * low)
    np.testing.assert_allclose(optimizer.state["nu"], 0.01 * low**2)
    assert optimizer.state["count"] == 5


def test_decay_is_decoupled_unscaled_and_uses_the_weight_before_the_update():
    grads, start = gradients(1), np.ones(KERNEL)
    options = dict(lr=0.1, scale=0.5, weight_decay=0.2)
    plain, _ = twin.run(start, grads, 3, twin.sgd(), **(options | {"weight_decay": 0.0}))
    decayed, _ = twin.run(start, grads, 3, twin.sgd(), **options)
    after, _ = twin.run(start, grads, 3, twin.sgd(), decay_after=True, **options)
    np.testing.assert_allclose(decayed, plain - 0.02, atol=1e-12)
    np.testing.assert_allclose(after, plain * 0.98, atol=1e-12)


def test_numbers_may_be_schedules():
    grads = gradients(3)
    falling, _ = twin.run(np.zeros(KERNEL), grads, 3, twin.sgd(), lr=lambda t: 0.1 / (t + 1))
    step = np.diff(falling, axis=0, prepend=np.zeros((1, *KERNEL)))
    constant, _ = twin.run(np.zeros(KERNEL), grads, 3, twin.sgd(), lr=0.1)
    plain = np.diff(constant, axis=0, prepend=np.zeros((1, *KERNEL)))
    np.testing.assert_allclose(step, plain / np.arange(1, 4)[:, None, None], atol=1e-12)
