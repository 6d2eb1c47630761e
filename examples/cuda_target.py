"""Compiling for NVIDIA GPUs where there are none.

Needs XLA's CUDA compiler in the version of the installed jax, but neither a driver nor the CUDA
libraries::

    pip install --no-deps jax-cuda12-plugin==$JAX jax-cuda12-pjrt==$JAX nvidia-cuda-nvcc-cu12
"""

import os
from typing import Any

import jax
from jax.experimental import topologies

# What the compiler asks about a device, here NVIDIA's H100 SXM with 80 GB.
_H100 = {
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "registers_per_core_limit": 2**16,
    "registers_per_block_limit": 2**16,
    "shared_memory_per_core": 228 * 1024,
    "shared_memory_per_block": 48 * 1024,
    "shared_memory_per_block_optin": 227 * 1024,
    "l2_cache_size": 50 * 2**20,
    "memory_bandwidth": 3_352_320_000_000,
    "device_memory_size": 84_942_979_072,
}


def prepare() -> None:
    """Makes JAX ready for a device that is not there; call it before JAX computes anything."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    # Tuning would run kernels.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"


def h100(count: int = 1) -> list[Any]:
    """Devices to make meshes of; they can be compiled for, not run on."""
    numbers = " ".join(f"{name}: {value}" for name, value in _H100.items())
    target = f"""
        gpu_device_info {{ {numbers} cuda_compute_capability {{ major: 9 }} }}
        platform_name: "CUDA"
        runtime_version {{ major: 12 minor: 9 patch: 0 }}
        dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
        device_description_str: "NVIDIA H100 80GB HBM3"
    """
    topology = topologies.get_topology_desc(
        "", "cuda", topology=f"1x1x{count}", target_config=target
    )
    return list(topology.devices)
