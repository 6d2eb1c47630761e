"""The PyTorch packages, on the same matrices and the same device."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.llama_block import BlockSize

NEVER = 10**9
NOT_INSTALLED = 'not installed (pip install -e ".[peers]")'

Steps = dict[str, Callable[[], Any]]
MakeOptimizer = Callable[[list[Any], int, int], Any]


def torch_optimizers(size: BlockSize) -> tuple[dict[str, Steps], dict[str, str]]:
    """Ordinary and refreshing steps per package, neither of which knows a warm start.

    Returns:
      The steps by optimizer, and the packages that are left out with the reason.
    """
    steps: dict[str, Steps] = {}
    left_out: dict[str, str] = {}
    for name, (package, load) in _PACKAGES.items():
        try:
            steps[name] = _steps(size, load(), _device())
        except ImportError:
            left_out[package] = NOT_INSTALLED
        except NoSuchDeviceError as error:
            left_out[package] = str(error)
    return steps, left_out


class NoSuchDeviceError(RuntimeError):
    """PyTorch cannot run where JAX does."""


def _device() -> str:
    """Where JAX computes, as PyTorch calls it."""
    import torch

    if jax.default_backend() == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise NoSuchDeviceError(f"torch {torch.__version__} sees no GPU")
    # As JAX multiplies in fp32 by default.
    torch.set_float32_matmul_precision("high")
    return "cuda"


def _galore_torch() -> MakeOptimizer:
    from galore_torch import GaLoreAdamW

    def make(params: list[Any], rank: int, gap: int) -> Any:
        group = {"params": params, "rank": rank, "update_proj_gap": gap}
        group |= {"scale": 0.25, "proj_type": "std"}
        return GaLoreAdamW([group], lr=1e-2, no_deprecation_warning=True)

    return make


def _pytorch_optimizer() -> MakeOptimizer:
    from pytorch_optimizer import GaLore

    def make(params: list[Any], rank: int, gap: int) -> Any:
        group = {"params": params, "rank": rank, "update_proj_gap": gap}
        group |= {"scale": 0.25, "projection_type": "std"}
        return GaLore([group], lr=1e-2)

    return make


_PACKAGES: dict[str, tuple[str, Callable[[], MakeOptimizer]]] = {
    "galore-torch": ("galore-torch", _galore_torch),
    "pytorch-optimizer GaLore": ("pytorch-optimizer", _pytorch_optimizer),
}


def _steps(size: BlockSize, make: MakeOptimizer, device: str) -> Steps:
    import torch

    rng = np.random.default_rng(0)

    def step(optimizer: Any) -> None:
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    def build(gap: int) -> Callable[[], Any]:
        params = []
        for fan_in, fan_out in size.shapes.values():
            param = torch.nn.Parameter(torch.randn(fan_out, fan_in, device=device) * 0.02)
            gradient = rng.standard_normal((fan_out, fan_in), np.float32)
            param.grad = torch.from_numpy(gradient).to(device) * 1e-2
            params.append(param)
        optimizer = make(params, size.rank, gap)
        optimizer.step()  # the first step builds the state
        return functools.partial(step, optimizer)

    refresh = build(1)
    return {"ordinary": build(NEVER), "warm": refresh, "cold": refresh}
