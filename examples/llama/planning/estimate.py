"""The peak of a step on one device, and the cards that it fits on."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

import galore_jax as gj
from examples.llama import mesh
from examples.llama.planning.phases import Phase, phases
from examples.llama.planning.run import Run
from examples.llama.planning.sizes import sizes_of

CARDS = (8, 12, 16, 24, 48, 80)  # GB of 1e9 bytes


class Estimate(NamedTuple):
    """Bytes on one device.

    Args:
        kept: weights, and optimizer state by role: what lives between steps.
        phases: what lives besides in each phase of a step.
    """

    kept: gj.memory.Roles
    phases: list[Phase]

    @property
    def fullest(self) -> Phase:
        """The phase in which the peak is."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        return self.kept.total + self.fullest.total


def estimate(run: Run, *, guarded: bool = True) -> Estimate:
    """The memory of a step; see `planning.phases` for what is counted."""
    return Estimate(kept_between_steps(run), phases(sizes_of(run), guarded=guarded))


def kept_between_steps(run: Run) -> gj.memory.Roles:
    """Weights and optimizer state on one device, exactly."""
    state = jax.tree.map(_shard, run.state)
    # The structure of the parameters is what counts here, not their shapes.
    roles = gj.memory.report(state.opt_state, run.state.params)
    return gj.memory.Roles(
        weights=mesh.bytes_per_device(run.state.params),
        projectors=roles.projectors,
        moments=roles.moments,
        full_rank=roles.full_rank,
        refresh=roles.refresh,
        other=roles.other + mesh.bytes_per_device(run.state.step),
    )


def fits(peak: int) -> dict[int, bool]:
    """Whether a peak fits on each card; the driver and the libraries want some of it as well."""
    return {card: peak <= card * 10**9 for card in CARDS}


def _shard(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
