"""Operations of the matrix products of a traced program."""

import math
from typing import Any

import jax


def of_products(jaxpr: jax.extend.core.Jaxpr, times: int = 1) -> tuple[int, int]:
    """Floating-point operations, two for each multiplication and addition.

    Args:
      jaxpr: A traced function; a scan counts as often as it runs.
      times: How often `jaxpr` itself runs.

    Returns:
      Those of every call, and those inside the larger branches of conditionals, with loops of an
      unknown number of turns counted once.
    """
    always = sometimes = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            always += times * _dot(eqn)
        elif eqn.primitive.name == "cond":
            sometimes += max(sum(of_products(b.jaxpr, times)) for b in eqn.params["branches"])
        else:
            turns = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
            for inner in _inside(eqn):
                more, perhaps = of_products(inner, turns)
                always, sometimes = always + more, sometimes + perhaps
    return always, sometimes


def _dot(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _inside(eqn: Any) -> list[Any]:
    found = []
    for name, value in eqn.params.items():
        if name in ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "cond_jaxpr"):
            continue
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            found.append(inner)
    return found
