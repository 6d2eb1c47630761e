"""Every product that a projected weight takes part in, and those that it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import distance, normal

import galore_jax as gj
from galore_jax import projectors
from galore_jax.backward import einsum
from galore_jax.backward.contraction import (
    dot_contraction,
    einsum_contraction,
    matmul_contraction,
    projected_contraction,
)

RANK = 3

# Subscripts, shapes of activations and weight, axes of its matrices.
EINSUMS = [
    ("bd,df->bf", (7, 10), (10, 12), gj.MatrixAxes()),
    ("...d,df->...f", (2, 3, 4, 10), (10, 12), gj.MatrixAxes()),
    ("bd,fd->bf", (7, 10), (12, 10), gj.MatrixAxes(1, 0)),
    ("db,fd->fb", (10, 7), (12, 10), gj.MatrixAxes(1, 0)),
    ("...d,dhk->...hk", (2, 7, 10), (10, 3, 4), gj.MatrixAxes(0, (1, 2))),
    ("bthk,hkd->btd", (2, 7, 3, 4), (3, 4, 10), gj.MatrixAxes((0, 1), 2)),
    ("bthk,kdh->btd", (2, 7, 3, 4), (4, 10, 3), gj.MatrixAxes((2, 0), 1)),
    # A batch of matrices: with activations of its own, with shared ones, with a shared result.
    ("ebd,edf->ebf", (2, 7, 10), (2, 10, 12), gj.MatrixAxes()),
    ("bd,edf->ebf", (7, 10), (2, 10, 12), gj.MatrixAxes()),
    ("bed,edf->bf", (7, 2, 10), (2, 10, 12), gj.MatrixAxes()),
    ("bthk,hkd->btd", (2, 7, 3, 8), (3, 8, 10), gj.MatrixAxes(1, 2)),
    ("bd,dhk->bhk", (7, 10), (10, 2, 8), gj.MatrixAxes(0, 2)),
    ("gbd,gedf->bgef", (2, 7, 10), (2, 3, 10, 12), gj.MatrixAxes()),
    ("xbd,df->bf", (2, 7, 10), (10, 12), gj.MatrixAxes()),  # an axis that is summed up
]
MATMULS = [
    ((10,), (10, 12)),
    ((7, 10), (10, 12)),
    ((2, 7, 10), (10, 12)),
    ((2, 3, 7, 10), (10, 12)),
    ((10,), (2, 10, 12)),
    ((7, 10), (2, 10, 12)),
    ((1, 7, 10), (2, 10, 12)),
    ((2, 7, 10), (2, 10, 12)),
    ((3, 2, 7, 10), (2, 10, 12)),
    ((2, 7, 10), (3, 2, 10, 12)),
]


def law(contraction, plain, x_shape, w_shape, axes, side):
    """What is computed from x and dy is what could be computed from the gradient."""
    x, w = normal(x_shape, 1), normal(w_shape, 2)
    rules = gj.views.plan.Rules(RANK, side, axes, None)
    (plan,) = gj.views.leaf_plan(rules, {"w": w})
    view, how = plan.view, projected_contraction(contraction, plan)
    y, pull = jax.vjp(plain, x, w)
    np.testing.assert_allclose(contraction(x, w), y, rtol=1e-5, atol=1e-6)
    dy = normal(y.shape, 3)
    dx, gradient = pull(dy)
    assert distance(contraction.cotangent_of_x(x, w, dy), dx) < 1e-6
    basis = normal(view.basis_shape(RANK), 4)
    assert distance(how.project(x, dy, basis), view.project(gradient, basis)) < 1e-6
    matrices = view.to_matrices(gradient).reshape(-1, view.kept_size, view.projected_size)
    for number, matrix in enumerate(matrices):
        found = how.matrices(x, dy, jnp.float32)(jnp.uint32(number))
        assert found.shape == matrix.shape and found.projects_input == view.projects_input
        assert found.dense is None
        assert distance(found.matmul(jnp.eye(matrix.shape[1])), matrix) < 1e-6
        assert distance(found.rmatmul(jnp.eye(matrix.shape[0])), matrix.T) < 1e-6
        assert jnp.max(jnp.abs(matrix)) <= found.magnitude < jnp.inf


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("subscripts, x, w, axes", EINSUMS, ids=lambda v: str(v).replace(" ", ""))
@pytest.mark.sampled(4)
def test_einsum(subscripts, x, w, axes, side):
    contraction = einsum_contraction(subscripts, len(x), len(w))
    law(contraction, lambda x, w: jnp.einsum(subscripts, x, w), x, w, axes, side)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("x, w", MATMULS, ids=lambda v: "x".join(map(str, v)))
@pytest.mark.sampled(4)
def test_matmul(x, w, side):
    law(matmul_contraction(len(x), len(w)), jnp.matmul, x, w, gj.MatrixAxes(), side)


DOTS = [
    ((2, 7, 10), (10, 12), (((2,), (0,)), ((), ())), gj.MatrixAxes()),
    ((10, 7), (12, 10), (((0,), (1,)), ((), ())), gj.MatrixAxes(1, 0)),
    ((2, 7, 3, 4), (3, 4, 10), (((2, 3), (0, 1)), ((), ())), gj.MatrixAxes((0, 1), 2)),
    ((7, 2, 10), (2, 10, 12), (((2,), (1,)), ((1,), (0,))), gj.MatrixAxes()),
]


@pytest.mark.parametrize("x, w, numbers, axes", DOTS, ids=lambda v: str(v).replace(" ", ""))
def test_dot_general(x, w, numbers, axes):
    contraction = dot_contraction(len(x), len(w), numbers)
    law(contraction, lambda x, w: jax.lax.dot_general(x, w, numbers), x, w, axes, "short")


@pytest.mark.parametrize("subscripts, x, w, axes", EINSUMS, ids=lambda v: str(v).replace(" ", ""))
@pytest.mark.sampled(3)
def test_products_of_arrays_and_of_codes(subscripts, x, w, axes):
    del axes
    x, w = normal(x, 1), normal(w, 2)
    np.testing.assert_array_equal(einsum(subscripts, x, w), jnp.einsum(subscripts, x, w))
    codes = gj.quant.quantize(w, block=2)
    np.testing.assert_array_equal(
        einsum(subscripts, x, codes), jnp.einsum(subscripts, x, gj.quant.dequantize(codes))
    )


REFUSED = {
    "other axes": ("bd,dhk->bhk", (7, 10), (10, 3, 4), gj.MatrixAxes((0, 1), 2)),
    "both contracted": ("bdf,df->b", (7, 10, 12), (10, 12), gj.MatrixAxes()),
    "neither contracted": ("b,df->bdf", (7,), (10, 12), gj.MatrixAxes()),
    "entry by entry": ("bdf,df->bf", (7, 10, 12), (10, 12), gj.MatrixAxes()),
    "summed up by itself": ("bd,dfg->bf", (7, 10), (10, 6, 2), gj.MatrixAxes(0, (1, 2))),
    "a diagonal": ("bd,dd->bd", (7, 10), (10, 10), gj.MatrixAxes()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_products_with_other_sides_are_refused(name):
    subscripts, x, w, axes = REFUSED[name]
    with pytest.raises(ValueError, match="leaf 'here/w' of shape"):
        gradient_of(lambda x, w: einsum(subscripts, x, w), normal(x), normal(w), axes=axes)


def gradient_of(product, x, w, **options):
    tx = gj.galore_sgd(1.0, RANK, **options)
    params = {"here": {"w": w}}
    return gj.projected_value_and_grad(
        lambda params, x: jnp.sum(jnp.sin(product(x, params["here"]["w"]))), tx
    )(params, tx.init(params), x)[1]["here"]["w"]


@pytest.mark.parametrize(
    "subscripts", ["bd,df", "bd->bf", "bd,df,fg->bg", "bde,df->bf", "bd,dfg->bfg", "bZ,Zf->bf"]
)
def test_subscripts_that_do_not_fit(subscripts):
    with pytest.raises(ValueError, match=r"subscripts|does not fit"):
        gradient_of(lambda x, w: einsum(subscripts, x, w), normal((7, 10)), normal((10, 12)))


def test_sizes_that_do_not_fit():
    for x in ((7, 1), (7, 11)):
        with pytest.raises(ValueError, match=r"leaf 'here/w' of shape \(10, 12\) does not fit"):
            gradient_of(gj.matmul, normal(x), normal((10, 12)))


WRONG = {
    "a slice of the batch": lambda x, w: x @ jax.tree.map(lambda p: p[:1], w),
    "entries of a matrix": lambda x, w: x @ jax.tree.map(lambda p: p[None], w),
}


@pytest.mark.parametrize("name", WRONG)
def test_only_leading_axes_are_indexed(name):
    with pytest.raises(ValueError, match="leaf 'here/w'"):
        gradient_of(WRONG[name], normal((7, 10)), normal((2, 10, 12)), axes=gj.MatrixAxes())


def test_indexing_by_brackets():
    x, w = normal((7, 10)), normal((3, 10, 12))
    whole = gradient_of(lambda x, w: x @ w[...], x, w, axes=gj.MatrixAxes())
    each = gradient_of(
        lambda x, w: jnp.stack([x @ w[i] for i in range(3)]), x, w, axes=gj.MatrixAxes()
    )
    lifted = [jnp.einsum("lkr,lpr->lkp", g.value, g.basis) for g in (each, whole)]
    assert distance(*lifted) < 1e-5
    np.testing.assert_array_equal(each.moved, [True] * 3)
    with pytest.raises(IndexError, match="leaf 'here/w'"):
        gradient_of(lambda x, w: x @ w[0], x, w[0])


NO_PRODUCTS = {
    "w.T": lambda x, w: x @ w.T.T,
    "w @ x": lambda x, w: w @ x.T,
    "w ** 2": lambda x, w: w**2,
    "2 * w": lambda x, w: 2 * w,
    "x + w": lambda x, w: x[:1, :1] + w,
    "numpy * w": lambda x, w: np.float32(2) * w,
    "-w": lambda x, w: -w,
    "jnp.dot": jnp.dot,
    "jnp.matmul": jnp.matmul,
    "jnp.einsum": lambda x, w: jnp.einsum("bd,df->bf", x, w),
    "jnp.tensordot": lambda x, w: jnp.tensordot(x, w, 1),
    "jnp.square": lambda x, w: jnp.square(w),
    "jnp.asarray": lambda x, w: jnp.asarray(w),
    "jnp.take": lambda x, w: jnp.take(w, jnp.arange(2), axis=0),
    "np.asarray": lambda x, w: np.asarray(w),
}


@pytest.mark.parametrize("kind", ["projected", "codes"])
@pytest.mark.parametrize("name", NO_PRODUCTS)
def test_anything_but_a_product_names_the_leaf_and_the_remedy(name, kind):
    x, w = normal((7, 10)), normal((10, 12))

    def loss(params):
        return jnp.sum(NO_PRODUCTS[name](x, params["here"]["w"]))

    params, tx = {"here": {"w": w}}, gj.galore_sgd(1.0, RANK)
    with pytest.raises((TypeError, AttributeError), match=r"leaf 'here/w' .*galore_jax\.matmul"):
        if kind == "projected":
            gj.projected_value_and_grad(loss, tx)(params, tx.init(params))
        else:
            gj.quant.value_and_grad(loss)(gj.quant.quantize_params(params, block=2))


@pytest.mark.parametrize("kind", ["projected", "codes"])
def test_every_way_to_multiply_is_one_product(kind):
    x, w = normal((7, 10)), normal((10, 12))
    if kind == "codes":
        w = gj.quant.quantize(w, block=2)

    def gradient(product):
        if kind == "projected":
            return gradient_of(product, x, w).value
        return gj.quant.value_and_grad(lambda w: jnp.sum(jnp.sin(product(x, w))))(w)[1]

    expected = gradient(gj.matmul)
    for product in (
        gj.quant.matmul,
        lambda x, w: x @ w,
        lambda x, w: np.asarray(x) @ w,
        lambda x, w: einsum("bd,df->bf", x, w),
    ):
        assert distance(gradient(product), expected) < 1e-6


FIRST = {"rank": RANK, "axes": gj.MatrixAxes()}
# Whether a pullback projects the gradients of an optimizer.
CHOICES = {
    "a lens": (gj.galore_adamw(1e-2, **FIRST), True),
    "masked": (optax.masked(gj.galore_sgd(1e-2, **FIRST), {"w": True}), True),
    "partition": (gj.galore_adafactor(1e-2, **FIRST), True),
    "injected": (
        optax.inject_hyperparams(gj.galore_sgd, static_args=gj.STATIC_ARGS)(1e-2, **FIRST), True),
    "in a window": (gj.accumulate(gj.galore_sgd(1e-2, **FIRST), 2), True),
    "clipped in a window": (
        gj.accumulate(optax.chain(optax.clip(0.1), gj.galore_sgd(1e-2, **FIRST)), 2), True),
    "behind the previous norm": (
        optax.chain(gj.layerwise.clip_by_previous_norm(1.0), gj.galore_sgd(1e-2, **FIRST)), True),
    "behind a clip": (optax.chain(optax.clip(0.1), gj.galore_sgd(1e-2, **FIRST)), False),
    "behind a momentum": (optax.chain(optax.trace(0.9), gj.galore_sgd(1e-2, **FIRST)), False),
    "behind a lens": (
        optax.chain(
            gj.low_rank_projection(optax.identity(), targets=lambda *_: False, **FIRST),
            gj.galore_sgd(1e-2, **FIRST)), False),
    "in sums at full size": (optax.MultiSteps(gj.galore_sgd(1e-2, **FIRST), 2), False),
    "exact": (gj.galore_sgd(1e-2, projector=projectors.svd(), **FIRST), False),
    "not projected": (optax.adam(1e-2), False),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_a_pullback_projects_where_a_lens_gets_the_gradient(name):
    """And forms it where anything else does."""
    tx, projected = CHOICES[name]
    x, w, dy = normal((7, 10)), normal((10, 12)), normal((7, 12), 1)
    _, pull = gj.backward.pullback(lambda p, x: x @ p["w"], {"w": w}, tx.init({"w": w}), x)
    (gradients, dx), full = pull(dy), x.T @ dy
    assert distance(dx, dy @ w.T) < 1e-6
    found = gradients["w"]
    assert isinstance(found, gj.ProjectedGradient) == projected
    if projected:
        assert found.value.shape == (12, RANK)
        assert distance(found.value, full.T @ found.basis) < 1e-5
    else:
        assert distance(found, full) < 1e-6


@pytest.mark.parametrize("projector", [projectors.svd(), projectors.gram_eigh()], ids=repr)
def test_projectors_that_need_the_gradient_are_refused(projector):
    with pytest.raises(ValueError, match=r"leaf 'here/w': .*randomized_svd"):
        gradient_of(gj.matmul, normal((7, 10)), normal((10, 12)), projector=projector)


def test_states_of_other_optimizers_are_refused():
    params = {"w": normal((10, 12))}
    tx = gj.galore_sgd(1.0, RANK)
    fn = gj.projected_value_and_grad(lambda p, x: jnp.sum(x @ p["w"]), tx)
    two = gj.low_rank_projection(gj.scale_by_factored_rms(), RANK)
    states = [
        ((), "the state has 0"),
        ((tx.init(params), two.init(params)), "state of another optimizer"),
        (gj.galore_sgd(1.0, RANK + 1).init(params), "rank"),
        (gj.galore_sgd(1.0, RANK, side="long").init(params), "side"),
    ]
    for state, message in states:
        with pytest.raises(ValueError, match=message):
            fn(params, state, normal((7, 10)))
