"""No collective of a compiled update has the size of a gradient."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_jax as gj

pytestmark = pytest.mark.standard_promotion  # Adam's bias correction


def collectives(text):
    """Shapes of everything that is gathered or reduced in a compiled program."""
    pattern = r"= \(?(?:[a-z0-9]+\[[\d,]*\][^=]*?) (?:all-gather|all-reduce)"
    for match in re.finditer(pattern, text):
        for dims in re.findall(r"\[([\d,]*)\]", match.group(0)):
            yield math.prod(int(d) for d in dims.split(",") if d)


def largest_collective(projector, specs):
    """Of an update of matrices [512, 256] and [256, 768], refresh included, at rank 16."""
    shapes = {"w": (512, 256), "v": (256, 768)}
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = {"fsdp": P("data"), "both": P("data", "model"), "tensor": P(None, "model")}[specs]
    sharding = dict.fromkeys(shapes, NamedSharding(mesh, spec))
    tx = gj.galore_adamw(1e-2, rank=16, projector=projector)
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    states = gj.state_sharding(tx, params, sharding)
    update = jax.jit(
        tx.update, in_shardings=(sharding, states, sharding), out_shardings=(sharding, states)
    )
    text = update.lower(params, jax.eval_shape(tx.init, params), params).compile().as_text()
    return max(collectives(text))


@pytest.mark.parametrize(
    "projector", [gj.projectors.randomized_svd(), gj.projectors.subspace_iteration()], ids=repr
)
@pytest.mark.parametrize("specs", ["fsdp", "both", "tensor"])
@pytest.mark.sampled(2)
def test_no_collective_has_the_size_of_a_gradient(projector, specs):
    assert 0 < largest_collective(projector, specs) <= 768 * 16  # a sketch


def test_a_full_factorization_gathers_the_gradient_and_is_seen_to():
    assert largest_collective(gj.projectors.svd(), "both") >= 512 * 256
