"""The PyTorch packages, on the same matrices. Import fails where they are not installed."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from galore_torch import GaLoreAdamW

from benchmarks.llama_block import BlockSize

NEVER = 10**9


def torch_optimizers(size: BlockSize) -> dict[str, dict[str, Callable[[], Any]]]:
    """Ordinary and refreshing steps per package; neither knows a warm start."""
    peers = {"galore-torch": functools.partial(_steps, size, _galore_torch)}
    try:
        import pytorch_optimizer  # noqa: F401

        peers["pytorch-optimizer GaLore"] = functools.partial(_steps, size, _pytorch_optimizer)
    except ImportError:
        pass
    return {name: build() for name, build in peers.items()}


def _galore_torch(params: list[Any], rank: int, gap: int) -> Any:
    group = {
        "params": params,
        "rank": rank,
        "update_proj_gap": gap,
        "scale": 0.25,
        "proj_type": "std",
    }
    return GaLoreAdamW([group], lr=1e-2, no_deprecation_warning=True)


def _pytorch_optimizer(params: list[Any], rank: int, gap: int) -> Any:
    from pytorch_optimizer import GaLore

    group = {
        "params": params,
        "rank": rank,
        "update_proj_gap": gap,
        "scale": 0.25,
        "projection_type": "std",
    }
    return GaLore([group], lr=1e-2)


def _steps(size: BlockSize, make: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
    rng = np.random.default_rng(0)

    def step(optimizer: Any) -> None:
        optimizer.step()

    def build(gap: int) -> Callable[[], Any]:
        params = []
        for fan_in, fan_out in size.shapes.values():
            param = torch.nn.Parameter(torch.randn(fan_out, fan_in) * 0.02)
            gradient = rng.standard_normal((fan_out, fan_in), np.float32)
            param.grad = torch.from_numpy(gradient) * 1e-2
            params.append(param)
        optimizer = make(params, size.rank, gap)
        optimizer.step()  # the first step builds the state
        return functools.partial(step, optimizer)

    refresh = build(1)
    return {"ordinary": build(NEVER), "warm": refresh, "cold": refresh}
