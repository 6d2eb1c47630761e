"""A lens on one tree: plans of its leaves, their kinds, and a state as the lens needs it."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax.codecs import Codec
from galore_jax.keys import matrix_keys
from galore_jax.leaves import Leaves, abstract, is_one_leaf
from galore_jax.refresh import Matrices, phases
from galore_jax.transforms import subspace
from galore_jax.transforms.config import LowRankConfig
from galore_jax.transforms.state import LowRankState, RefreshState, check_state
from galore_jax.transforms.subspace import LeafSubspace
from galore_jax.views import LeafPlan, ProjectedGradient
from galore_jax.views.plan import leaf_plan

# What decides the shapes and the meaning of stored arrays: a state made with other values cannot
# go on. Everything else (gap, transport, projector, axis_name, seed) may change between runs.
_FIXED = ("rank", "side", "axes", "targets", "codec", "state_dtype")

# Number of the layer that a slice of stacked leaves is of.
Layer = jax.Array | int


@dataclasses.dataclass(frozen=True)
class Lens:
    """A lens on one tree: everything that is known before the numbers.

    Args:
      config: The lens.
      plans: One plan per leaf.
      treedef: Structure of the tree.
    """

    config: LowRankConfig
    plans: tuple[LeafPlan, ...]
    treedef: Any

    @classmethod
    def of(cls, config: LowRankConfig, treedef: Any, shapes: Sequence[Any]) -> Lens:
        """The lens on a tree of such shapes; planned once."""
        return _planned(config, treedef, tuple(shapes))

    @functools.cached_property
    def kinds(self) -> dict[str, list[int]]:
        """Numbers of the projected leaves by kind: one weight of several layers is one kind."""
        projected = [i for i, plan in enumerate(self.plans) if plan.is_projected]
        return kinds_of([(i, self.plans[i].path, self.plans[i].batch_shape) for i in projected])

    def subspaces(self, state: LowRankState, layer: Layer = 0) -> list[LeafSubspace]:
        """The subspaces of every leaf; placeholders for those that are not projected."""
        stored, flags = self.treedef.flatten_up_to(state.projectors), state.refresh_state
        due, refreshes = self.per_leaf(flags.due), self.per_leaf(flags.refreshes)
        for i, plan in enumerate(self.plans):
            if not plan.is_projected:
                due[i], refreshes[i] = jnp.zeros((), bool), jnp.zeros((), jnp.int32)
        return [
            LeafSubspace(*leaf, self.keys(state.count, i, leaf[0].path, layer))
            for i, leaf in enumerate(zip(self.plans, stored, due, refreshes, strict=True))
        ]

    def keys(
        self, count: jax.Array, leaf: int, paths: str | Sequence[str], layer: Layer
    ) -> jax.Array:
        """Randomness of this step for a leaf, or for several with equal batch axes."""
        return matrix_keys(self.config.seed, count, paths, self.plans[leaf].batch_shape, layer)

    def at_state_dtype(self, leaf: int, value: Any) -> Any:
        """A leaf at full size as the inner transformation sees it."""
        if not self.plans[leaf].is_inexact:
            return optax.MaskedNode()  # integers are nothing that an optimizer can average
        value = value if is_one_leaf(value) else jnp.asarray(value)
        return value.astype(self.low_rank_shape(leaf).dtype)

    def per_leaf(self, by_kind: dict[str, jax.Array]) -> list[Any]:
        """Flags of every leaf, ``[*batch]``, from those by kind; None where it is not projected."""
        flags: list[Any] = [None] * len(self.plans)
        for name, members in self.kinds.items():
            for place, i in enumerate(members):
                lone = len(members) == 1
                flags[i] = by_kind[name] if lone else by_kind[name][place]
        return flags

    def memories(self, per_leaf: list[Any]) -> Any:
        """State of the recovery; nothing if it remembers nothing."""
        return self.treedef.unflatten(per_leaf) if jax.tree.leaves(per_leaf) else ()

    def memory_of(self, recovery_state: Any) -> list[Any]:
        """Inverse of `memories`."""
        if not jax.tree.leaves(recovery_state):
            return [()] * len(self.plans)
        return self.treedef.flatten_up_to(recovery_state)

    def first_projectors(self) -> Any:
        """Initial bases, stored."""
        if not self.plans and not _is_one_array(self.config.codec):
            # For optax.tree_map_params, which calls `init` with a tree without leaves: parts of a
            # basis are nothing that is like a parameter.
            return jnp.zeros(())
        return self.treedef.unflatten(
            subspace.initial_basis(self.config, plan) if plan.is_projected else jnp.zeros(())
            for plan in self.plans
        )

    def first_flags(self) -> RefreshState:
        """Every matrix is due at count 0."""
        if not self.plans:
            nothing: Any = [jnp.zeros(())] * 4  # the same: flags are no parameters
            return RefreshState(*nothing)
        batches = {
            name: together([np.zeros(self.plans[i].batch_shape) for i in members])
            for name, members in self.kinds.items()
        }
        return RefreshState(
            due={name: jnp.ones(batch.shape, bool) for name, batch in batches.items()},
            refreshes={name: jnp.zeros(batch.shape, jnp.int32) for name, batch in batches.items()},
            overlap={name: jnp.zeros(batch.shape, jnp.float32) for name, batch in batches.items()},
            memory=self.first_memory(),
        )

    def first_memory(self) -> dict[str, Any]:
        """Memory of the policy before the first step, by kind."""
        mine = [i for i, plan in enumerate(self.plans) if plan.is_projected]
        places = dict(zip(mine, phases([self.plans[i].batch_shape for i in mine]), strict=True))
        return {
            name: self.config.refresh.init(
                Matrices(
                    jnp.asarray(together([places[i] for i in members])),
                    tuple(self.low_rank_shape(i) for i in members),
                )
            )
            for name, members in self.kinds.items()
        }

    def low_rank_shape(self, leaf: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of R, or of a leaf that is not projected, in the state dtype."""
        plan, dtype = self.plans[leaf], self.config.state_dtype
        if plan.view is not None:
            return jax.ShapeDtypeStruct(plan.view.low_rank_shape(plan.rank), dtype)
        is_complex = jnp.issubdtype(plan.dtype, jnp.complexfloating)
        return jax.ShapeDtypeStruct(plan.shape, plan.dtype if is_complex else dtype)


@functools.lru_cache(maxsize=256)
def _planned(config: LowRankConfig, treedef: Any, shapes: tuple[Any, ...]) -> Lens:
    return Lens(config, tuple(leaf_plan(config, treedef.unflatten(shapes))), treedef)


def kinds_of(leaves: Sequence[tuple[Any, str, tuple[int, ...]]]) -> dict[str, list[Any]]:
    """Groups leaves whose paths differ in numbers only and whose batch axes are equal.

    Args:
      leaves: For each projected leaf anything that identifies it, its path, and the shape of its
        batch axes.
    """
    groups: dict[Any, list[Any]] = {}
    for leaf, path, batch in leaves:
        name = re.sub(r"\d+", "N", path).replace("/", ".")
        groups.setdefault((name, batch), []).append(leaf)
    kinds: dict[str, list[Any]] = {}
    for (name, _), members in groups.items():
        while name in kinds:
            name += "'"
        kinds[name] = members
    return kinds


def check_same_storage(config: LowRankConfig, stored: Any) -> None:
    """Raises if a state made under `stored` cannot be continued under `config`.

    A checkpointer may have dropped the config, which holds no array: the shapes will tell.
    """
    if not isinstance(stored, LowRankConfig):
        return
    for name in _FIXED:
        ours, theirs = getattr(config, name), getattr(stored, name)
        if callable(ours) or callable(theirs):
            continue  # one may be a regex and the other a callable that says the same
        if ours != theirs:
            raise ValueError(
                f"this state was made with {name}={theirs!r}, but the transformation has "
                f"{name}={ours!r}. Gap, scale, projector and transport may change on resume; "
                f"{name} fixes the stored arrays. Restore with the old value or init anew."
            )


def check_alike(grads: Leaves, params: Leaves) -> None:
    """Raises unless gradients have the structure of their parameters."""
    if params.treedef != grads.treedef:
        raise ValueError(
            f"gradients have the structure {grads.treedef}, but `params` {params.treedef}."
        )


def full_shapes(grads: Leaves, params: optax.Params | None) -> list[jax.ShapeDtypeStruct]:
    """Shapes of the leaves; those of projected gradients are read off the parameters.

    Raises:
      ValueError: They are needed and not there, or a gradient has another shape than its parameter.
    """
    arrived = [isinstance(grad, ProjectedGradient) for grad in grads.values]
    if params is None:
        if any(arrived):
            raise ValueError(
                "a ProjectedGradient does not know the shape of its parameter: pass `params` to "
                "update."
            )
        return grads.shapes
    given = Leaves.of(params)
    if any(arrived):
        check_alike(grads, given)
    elif given.treedef != grads.treedef:
        return grads.shapes  # somebody's business: nothing is read off the parameters
    for i, (grad, like) in enumerate(zip(grads.values, given.shapes, strict=True)):
        if not arrived[i] and jnp.shape(grad) != like.shape:
            raise ValueError(
                f"leaf {grads.paths[i]!r}: the gradient has shape {jnp.shape(grad)}, its parameter "
                f"{like.shape}."
            )
    return [
        like if was_projected else abstract(grad)
        for was_projected, like, grad in zip(arrived, given.shapes, grads.values, strict=True)
    ]


def for_each_leaf(treedef: Any, kept: Any) -> list[Any]:
    """The parts of a tree in a state, in the places of the gradients.

    Raises:
      ValueError: The state was made for another tree.
    """
    try:
        return treedef.flatten_up_to(kept)
    except (ValueError, TypeError):  # JAX's message prints arrays
        raise ValueError(
            f"this state was made for parameters of another structure: gradients have {treedef}, "
            f"what the state keeps of them {jax.tree.structure(kept)}. Make one with init."
        ) from None


def entered(lens: Lens, state: Any) -> LowRankState:
    """A state as it was given, in the dtypes and with the options of this lens.

    Raises:
      TypeError: It is the state of something else.
      ValueError: It was made with another storage, or for other parameters.
    """
    check_state("a low-rank projection", state, LowRankState)
    check_same_storage(lens.config, state.config)
    if not lens.plans:
        return state._replace(config=lens.config)
    bases = for_each_leaf(lens.treedef, state.projectors)
    flags = state.refresh_state
    if not isinstance(flags.due, dict) or set(flags.due) != set(lens.kinds):
        raise ValueError(
            "this state was made for other parameters, or by an earlier version of galore_jax: "
            "its flags are not those of the matrices "
            f"{list(lens.kinds)[:3]}{'…' if len(lens.kinds) > 3 else ''}. Make one with init, or "
            "finish the run with the version that it was made with."
        )
    memory = flags.memory
    if jax.tree.leaves(memory) or not isinstance(state.config, LowRankConfig):
        expected = jax.eval_shape(lens.first_memory)
        form: Any = jax.tree.structure(expected)
        if jax.tree.structure(memory) == form:
            memory = jax.tree.map(lambda x, like: x.astype(like.dtype), memory, expected)
    if type(lens.config.refresh) is not type(getattr(state.config, "refresh", lens.config.refresh)):
        memory = lens.first_memory()  # that of a policy of another kind
    stored = [
        subspace.as_stored(lens.config, plan, basis) if plan.is_projected else basis
        for plan, basis in zip(lens.plans, bases, strict=True)
    ]
    return state._replace(
        config=lens.config,
        count=state.count.astype(jnp.int32),
        projectors=lens.treedef.unflatten(stored),
        refresh_state=RefreshState(
            due={name: due.astype(bool) for name, due in flags.due.items()},
            refreshes={name: x.astype(jnp.int32) for name, x in flags.refreshes.items()},
            overlap={name: x.astype(jnp.float32) for name, x in flags.overlap.items()},
            memory=memory,
        ),
    )


def _is_one_array(codec: Codec) -> bool:
    """Whether a basis is stored as an array of its own shape."""
    basis = jax.ShapeDtypeStruct((2, 1), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    return isinstance(jax.eval_shape(codec.encode, *basis), jax.ShapeDtypeStruct)


def together(arrays: list[Any]) -> Any:
    """Arrays of the leaves of one kind as one, ``[leaves, ...]``; that of a lone leaf as it is."""
    if len(arrays) == 1:
        return arrays[0]
    return np.stack(arrays) if isinstance(arrays[0], np.ndarray) else jnp.stack(arrays)
