"""How far Adam with 8-bit moments is from Adam with fp32 moments, on the gradients of a real run.

    python -m benchmarks.moment_accuracy [--steps 200]

`tiny` is trained with AdamW on the default corpus; the gradients of three of its matrices go to
every optimizer, and its update is compared with that of fp32 Adam: relative error of the update
(root mean square over the entries, mean and maximum over the steps after the tenth). All are given
weights of zero and a learning rate of one. bitsandbytes and torchao join when they are installed.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_jax as gj
from benchmarks import report
from benchmarks.torch_peers import NOT_INSTALLED
from examples.llama import config, train

LEAVES = {
    "q": ("blocks", "attn", "q", "kernel"),
    "gate": ("blocks", "mlp", "gate", "kernel"),
    "embedding": ("embed", "embedding"),
}
WARMUP = 10
Update = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    """Command line program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    makers, left_out = _optimizers()
    peers = {leaf: {name: make() for name, (make, _) in makers.items()} for leaf in LEAVES}
    errors: dict[str, dict[str, list[float]]] = {}
    for gradients in _gradients(options.steps):
        for leaf, gradient in gradients.items():
            updates = {name: peer(gradient) for name, peer in peers[leaf].items()}
            exact = updates.pop("fp32")
            for name, update in updates.items():
                error = np.linalg.norm(update - exact) / np.linalg.norm(exact)
                errors.setdefault(name, {}).setdefault(leaf, []).append(float(error))
    rows = []
    for name, by_leaf in errors.items():
        row: dict[str, Any] = {"moments": name, "bytes per entry": makers[name][1]}
        for leaf, series in by_leaf.items():
            row |= {f"{leaf}, mean": np.mean(series[WARMUP:]), f"{leaf}, max": max(series[WARMUP:])}
        rows.append(row)
    title = f"Relative error of Adam's update against fp32 moments, {options.steps} steps of tiny"
    report.publish(title, rows, "moment_accuracy", left_out)


def _gradients(steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Gradients of one layer's matrices along a run of AdamW."""
    arguments = ["--optimizer", "adamw", "--learning-rate", "1e-3", "--steps", str(steps)]
    task = train.make_task(config.resolve(config.parse(arguments)))
    params = task.new_state().params
    state = task.tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
        gradients = jax.grad(task.loss_fn)(params, batch)
        updates, state = task.tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, gradients

    batches = task.training(None)
    for _ in range(steps):
        params, state, gradients = step(params, state, next(batches))
        yield {leaf: _pick(gradients, path) for leaf, path in LEAVES.items()}


def _pick(tree: Any, path: tuple[str, ...]) -> np.ndarray:
    for name in path:
        tree = tree[name]
    return np.asarray(tree[0] if path[0] == "blocks" else tree)


def _optimizers() -> tuple[dict[str, tuple[Callable[[], Update], float]], dict[str, str]]:
    """What is compared.

    Returns:
      By name what makes an update function, and the bytes per entry of both moments; and the peers
      that are left out with the reason.
    """

    exact = functools.partial(_optax, optax.scale_by_adam())
    ours = functools.partial(_optax, gj.scale_by_adam8bit(min_size=1))
    in_8_bits = 2 * (1 + 4 / 256)
    found = {"fp32": (exact, 8.0), "galore_jax 8-bit": (ours, in_8_bits)}
    left_out = {}
    for name, load in (("bitsandbytes", _bitsandbytes), ("torchao", _torchao)):
        try:
            found[name] = (load(), in_8_bits)
        except ImportError:
            left_out[name] = NOT_INSTALLED
    return found, left_out


def _optax(tx: optax.GradientTransformation) -> Update:
    update = jax.jit(tx.update)
    state: list[Any] = []

    def step(gradient: np.ndarray) -> np.ndarray:
        if not state:
            state.append(tx.init(jnp.zeros(gradient.shape)))
        direction, state[0] = update(jnp.asarray(gradient), state[0])
        return np.asarray(direction)

    return step


def _bitsandbytes() -> Callable[[], Update]:
    from bitsandbytes.optim import Adam8bit

    return functools.partial(_torch, functools.partial(Adam8bit, lr=1.0, min_8bit_size=1, eps=1e-8))


def _torchao() -> Callable[[], Update]:
    from torchao.optim import Adam8bit

    return functools.partial(_torch, functools.partial(Adam8bit, lr=1.0, block_size=256, eps=1e-8))


def _torch(make: Callable[[Any], Any]) -> Update:
    import torch

    made: list[Any] = []

    def step(gradient: np.ndarray) -> np.ndarray:
        if not made:
            param = torch.nn.Parameter(torch.zeros(gradient.shape))
            made.extend([param, make([param])])
        param, optimizer = made
        param.data.zero_()
        param.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        return -param.detach().numpy()

    return step


if __name__ == "__main__":
    main()
