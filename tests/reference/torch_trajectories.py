"""Record what the released PyTorch optimizer does, on small matrices.

Run by hand where `galore-torch` is installed (README.md); the tests only read what it wrote.
Every array is in PyTorch's orientation, a weight being `[out, in]`.
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from galore_torch import GaLoreAdamW

STEPS = 20
SHAPES = {"tall": (16, 10), "wide": (10, 16), "square": (12, 12)}
PROJ_TYPES = ("std", "reverse_std", "left", "right")
SCALE_AND_DECAY = ((0.25, 0.0), (1.0, 0.1), (0.25, 0.1), (1.0, 0.0))
FAMILIES = {
    # no refresh after the first one
    "within": dict(betas=(0.9, 0.999), gap=1000, lr=0.05),
    # refreshes, but no memory: the signs of the singular vectors cancel out
    "across": dict(betas=(0.0, 0.0), gap=5, lr=0.05, eps=0.05),
    # refreshes and memory: the signs matter, so the bases are stored
    "kept": dict(betas=(0.9, 0.999), gap=5, lr=0.05, eps=1e-3),
}
PACKAGES = ("torch", "galore-torch", "transformers", "bitsandbytes", "numpy")


def orthogonal(rng, n):
    q, r = np.linalg.qr(rng.normal(size=(n, n)))
    return q * np.sign(np.diag(r))


def small_rotation(rng, n, size):
    skew = rng.normal(size=(n, n)) * size / np.sqrt(n)
    skew = (skew - skew.T) / 2
    return np.linalg.solve(np.eye(n) + skew, np.eye(n) - skew)


def gradients(rng, shape):
    """Evenly spaced singular values, one step apart, whose vectors turn a little every step."""
    out, in_ = shape
    k = min(shape)
    u, v = orthogonal(rng, out), orthogonal(rng, in_)
    steps = []
    for _ in range(STEPS):
        s = 0.2 * (np.arange(k, 0, -1) + rng.uniform(-0.2, 0.2, size=k))
        steps.append(u[:, :k] * s @ v[:, :k].T)
        u, v = u @ small_rotation(rng, out, 0.15), v @ small_rotation(rng, in_, 0.15)
    return np.stack(steps).astype(np.float32)


def side(shape, proj_type):
    """The axis that ends up projected, in words that do not depend on the orientation."""
    out, in_ = shape
    right = {"std": out >= in_, "reverse_std": out < in_, "left": False, "right": True}[proj_type]
    return "input" if right else "output"


def cases():
    for f, family in enumerate(("within", "across")):
        for i, shape in enumerate(SHAPES):
            for j, proj_type in enumerate(PROJ_TYPES):
                scale, decay = SCALE_AND_DECAY[(i + j + 2 * f) % 4]
                eps = (1e-3, 1e-8)[(i + j // 2) % 2]
                yield family, shape, proj_type, 4, scale, decay, eps
    yield "within", "tall", "std", 1, 0.25, 0.1, 1e-3
    yield "within", "wide", "std", 9, 1.0, 0.1, 1e-8
    yield "across", "wide", "std", 1, 1.0, 0.0, None
    yield "across", "tall", "std", 9, 0.25, 0.1, None
    yield "across", "square", "std", 11, 1.0, 0.1, None
    for shape, proj_type in (("tall", "std"), ("wide", "reverse_std"), ("square", "left")):
        yield "kept", shape, proj_type, 4, 0.25, 0.1, None


def record(weight, grads, config):
    parameter = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    group = dict(
        params=[parameter],
        rank=config["rank"],
        update_proj_gap=config["gap"],
        scale=config["scale"],
        proj_type=config["proj_type"],
    )
    optimizer = GaLoreAdamW(
        [group],
        lr=config["lr"],
        betas=(config["b1"], config["b2"]),
        eps=config["eps"],
        weight_decay=config["weight_decay"],
        no_deprecation_warning=True,
    )
    weights, bases = [], []
    for step, grad in enumerate(grads):
        parameter.grad = torch.from_numpy(grad.copy())
        optimizer.step()
        weights.append(parameter.detach().numpy().copy())
        if step % config["gap"] == 0:
            basis = optimizer.state[parameter]["projector"].ortho_matrix.numpy()
            bases.append(basis.T.copy() if config["side"] == "input" else basis.copy())
    return np.stack(weights), np.stack(bases)


def main():
    torch.set_num_threads(1)
    arrays, configs = {}, {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        rng = np.random.default_rng(2403_03507 + i)
        arrays[f"weight/{name}"] = rng.normal(scale=0.5, size=shape).astype(np.float32)
        arrays[f"grads/{name}"] = gradients(rng, shape)
    for family, shape, proj_type, rank, scale, decay, eps in cases():
        options = FAMILIES[family]
        b1, b2 = options["betas"]
        config = dict(
            family=family,
            shape=shape,
            proj_type=proj_type,
            side=side(SHAPES[shape], proj_type),
            rank=rank,
            gap=options["gap"],
            scale=scale,
            lr=options["lr"],
            b1=b1,
            b2=b2,
            eps=options.get("eps", eps),
            weight_decay=decay,
        )
        name = f"{family}-{shape}-{proj_type}-r{rank}"
        assert name not in configs, name
        configs[name] = config
        weights, bases = record(arrays[f"weight/{shape}"], arrays[f"grads/{shape}"], config)
        arrays[f"weights/{name}"] = weights
        if family == "kept":
            arrays[f"bases/{name}"] = bases
    versions = {p: version(p) for p in PACKAGES} | {"python": platform.python_version()}
    meta = json.dumps(dict(steps=STEPS, shapes=SHAPES, versions=versions, cases=configs))
    path = Path(__file__).with_suffix(".npz")
    np.savez_compressed(path, meta=np.array(meta), **arrays)
    print(f"{len(configs)} cases, {path.stat().st_size / 1000:.0f} kB, {versions}")


if __name__ == "__main__":
    main()
