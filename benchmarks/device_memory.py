"""What the device of this process says of its memory."""

import subprocess
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def total() -> int | None:
    """Bytes that the first device has for arrays when JAX may take all; None if it does not say.

    Takes all of it: call it in a process that does nothing else, with
    ``XLA_PYTHON_CLIENT_MEM_FRACTION=1.0`` and ``XLA_PYTHON_CLIENT_PREALLOCATE=false``.
    """
    return _statistics().get("bytes_limit")


def used() -> dict[str, Any]:
    """Peak of arrays and the pool that they live in, in GB (1e9 bytes); what it does not say is "".

    `process` is the driver's figure: the pool, JAX's context and the libraries' workspaces.
    """
    statistics = _statistics()
    return {
        "peak, GB": _gigabytes(statistics.get("peak_bytes_in_use")),
        "pool, GB": _gigabytes(statistics.get("bytes_limit")),
        "process, GB": _gigabytes(_process()),
    }


def _statistics() -> dict[str, int]:
    return jax.devices()[0].memory_stats() or {}


def _gigabytes(size: int | None) -> Any:
    return "" if size is None else size / 1e9


def _process() -> int | None:
    """Bytes in use on the first GPU, of everyone; None without NVIDIA's tool."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
        return int(answer.stdout.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
