"""One H100 to compile for, and the memory of what is compiled; see `examples.cuda_target`.

Import it before JAX computes anything.
"""

from typing import Any

import jax

from examples import cuda_target

cuda_target.prepare()


def h100() -> Any:
    """A device to make meshes of; it can be compiled for, not run on."""
    (device,) = cuda_target.h100()
    return device


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Arguments, results and temporaries, buffers that serve twice counted once."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
