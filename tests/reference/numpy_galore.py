"""GaLore for one matrix, in float64 NumPy: slow, obvious, and independent of the package.

A gradient is G `[reduction, output]` (the layout of a JAX kernel). One of the two axes is
*projected* onto an orthonormal basis P `[projected, rank]`, the other one is *kept*; the inner
optimizer sees R `[kept, rank]` and answers N of that shape, which is lifted back:

    R = Gᵀ P  (reduction axis projected)    or    G P  (output axis projected)
    update = -lr · (scale · lift(N) + weight_decay · W),    lift(N) = P Nᵀ   or   N Pᵀ

A refresh is due at steps 0, gap, 2·gap, … and happens before the gradient is projected. When the
gradient is all zero or not finite, the old basis stays and the refresh is due again on the next
step, without moving the later ones. The first basis is `eye(projected, rank)`. When the effective
rank min(rank, kept, projected) is the whole projected dimension, the inner runs on G itself and
`scale` does not apply.

What a refresh does to the inner state, with C = P_newᵀ P_old:

    keep     nothing
    reset    moments to zero; the step count stays
    align    nothing, but P_new is turned within its span to lie as close to P_old as it can,
             on the first refresh too, where P_old is the identity
    rotate   first moment   m_new = m Cᵀ
             second moment  v_new = w · |(v̂ - m̂²)(C∘C)ᵀ + (m̂ Cᵀ)²| + mean(v) · (1 - rowsum(C∘C))
             m̂ = m / (1 - b1ᵗ),  v̂ = v / w,  w = 1 - b2ᵗ,  t = the count at that moment;
             mean(v): over the rank axis, one number per kept row; rowsum(C∘C): one per new column
             (never above 1 in exact arithmetic; clipped). Nothing happens at t = 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Inner(NamedTuple):
    """An optimizer of one array: `init(shape) -> dict`, `update(g, dict) -> (direction, dict)`."""

    init: Callable
    update: Callable
    b1: float = 0.0
    b2: float = 0.0


def _zeros(*moments):
    return lambda shape: {"count": 0} | {name: np.zeros(shape) for name in moments}


def sgd():
    return Inner(_zeros(), lambda g, s: (g, {"count": s["count"] + 1}))


def trace(decay=0.9):
    """`optax.trace`: the sum, not the average, of past gradients."""

    def update(g, s):
        total = g + decay * s["trace"]
        return total, {"count": s["count"] + 1, "trace": total}

    return Inner(_zeros("trace"), update)


def lion(b1=0.9, b2=0.99):
    """`optax.scale_by_lion`: the sign of one average, the other one is remembered."""

    def update(g, s):
        direction = np.sign((1 - b1) * g + b1 * s["mu"])
        return direction, {"count": s["count"] + 1, "mu": (1 - b2) * g + b2 * s["mu"]}

    return Inner(_zeros("mu"), update, b1, b2)


def adam(b1=0.9, b2=0.999, eps=1e-8, eps_before_correction=False):
    """Adam as in optax, m̂ / (√v̂ + eps); or, as the released GaLore has it, with the eps added
    before the bias is corrected: √(1 - b2ᵗ) / (1 - b1ᵗ) · m / (√v + eps)."""

    def update(g, s):
        t = s["count"] + 1
        mu = b1 * s["mu"] + (1 - b1) * g
        nu = b2 * s["nu"] + (1 - b2) * g**2
        if eps_before_correction:
            direction = np.sqrt(1 - b2**t) / (1 - b1**t) * mu / (np.sqrt(nu) + eps)
        else:
            direction = (mu / (1 - b1**t)) / (np.sqrt(nu / (1 - b2**t)) + eps)
        return direction, {"count": t, "mu": mu, "nu": nu}

    return Inner(_zeros("mu", "nu"), update, b1, b2)


def singular_vectors(grad, rank, axis):
    """The leading singular vectors of G along `axis` (0 = reduction, 1 = output), in columns."""
    u, _, vt = np.linalg.svd(grad, full_matrices=False)
    return u[:, :rank] if axis == 0 else vt[:rank].T


def projected_axis(shape, side):
    """0 when the reduction axis is projected, 1 when the output axis is. Ties go to 0."""
    reduction, output = shape
    return {
        "short": 0 if reduction <= output else 1,
        "long": 0 if reduction >= output else 1,
        "input": 0,
        "output": 1,
    }[side]


def aligned(new, old):
    """Of all orthonormal bases of span(new), the one closest to `old` (Procrustes)."""
    left, _, right = np.linalg.svd(new.T @ old)
    return new @ (left @ right)


def rotated(state, new, old, b1, b2):
    """The inner state in the coordinates of the new basis; the formulas are at the top."""
    t = state["count"]
    if t == 0:
        return state
    c = new.T @ old
    moved = {k: v @ c.T if k in ("mu", "trace") else v for k, v in state.items()}
    if "nu" in state:
        w = 1 - b2**t
        m_hat, v_hat = state["mu"] / (1 - b1**t), state["nu"] / w
        spread = np.abs((v_hat - m_hat**2) @ (c**2).T + (m_hat @ c.T) ** 2)
        unseen = np.clip(1 - np.sum(c**2, axis=1), 0, None)
        moved["nu"] = w * spread + np.mean(state["nu"], axis=1, keepdims=True) * unseen
    return moved


class Galore:
    """`step(weight, grad)` returns the next weight; `basis`, `state`, `due` are there to look at.

    `decay_after` is the released code's order: W ← (W - lr · scale · lift(N)) · (1 - lr · wd).
    `basis_of(grad, rank, axis)` stands in for the exact SVD. `lr` and `scale` may be functions
    of the step.
    """

    def __init__(
        self, shape, rank, inner, *, gap=200, scale=1.0, side="short", transport="keep",
        lr=1e-3, weight_decay=0.0, decay_after=False, basis_of=singular_vectors,
    ):  # fmt: skip
        assert transport in ("keep", "reset", "align", "rotate"), transport
        self.axis = projected_axis(shape, side)
        projected, kept = shape[self.axis], shape[1 - self.axis]
        self.rank = min(rank, kept, projected)
        self.full = self.rank == projected
        self.inner, self.gap, self.scale, self.transport = inner, gap, scale, transport
        self.lr, self.weight_decay, self.decay_after = lr, weight_decay, decay_after
        self.basis_of = basis_of
        self.basis = np.eye(projected, self.rank)
        self.state = inner.init(shape if self.full else (kept, self.rank))
        self.count, self.due = 0, True

    def refresh(self, grad):
        if self.full or not (self.due or self.count % self.gap == 0):
            return
        self.due = not np.all(np.isfinite(grad)) or not np.any(grad)
        if self.due:
            return
        old, new = self.basis, self.basis_of(grad, self.rank, self.axis)
        if self.transport == "align":
            new = aligned(new, old)
        elif self.transport == "reset":
            self.state = {k: v if k == "count" else np.zeros_like(v) for k, v in self.state.items()}
        elif self.transport == "rotate":
            self.state = rotated(self.state, new, old, self.inner.b1, self.inner.b2)
        self.basis = new

    def project(self, grad):
        return grad.T @ self.basis if self.axis == 0 else grad @ self.basis

    def lift(self, low):
        return self.basis @ low.T if self.axis == 0 else low @ self.basis.T

    @np.errstate(invalid="ignore")  # a gradient that is not finite reaches the inner as it is
    def step(self, weight, grad):
        weight, grad = np.asarray(weight, np.float64), np.asarray(grad, np.float64)
        lr, scale = (x(self.count) if callable(x) else x for x in (self.lr, self.scale))
        self.refresh(grad)
        low, self.state = self.inner.update(grad if self.full else self.project(grad), self.state)
        direction = low if self.full else scale * self.lift(low)
        self.count += 1
        if self.decay_after:
            return (weight - lr * direction) * (1 - lr * self.weight_decay)
        return weight - lr * (direction + self.weight_decay * weight)


def run(weight, grads, rank, inner, **options):
    """The weights after every step, `[steps, reduction, output]`, and the optimizer at the end."""
    optimizer = Galore(np.shape(weight), rank, inner, **options)
    weights = []
    for grad in grads:
        weight = optimizer.step(weight, grad)
        weights.append(weight)
    return np.stack(weights), optimizer
