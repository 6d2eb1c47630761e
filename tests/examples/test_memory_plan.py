"""Plans of memory: against compiled steps, against arithmetic, and what is refused."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny_run
from jax.sharding import NamedSharding

from examples.llama import config, mesh, plan
from examples.llama.planning import compiled, phases
from examples.llama.planning.estimate import CARDS, Estimate, estimate, fits
from examples.llama.planning.run import abstract_mesh, make_run
from examples.llama.planning.sizes import sizes_of
from galore_jax.transforms.state import low_rank_states

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "compiled_memory.json"
WIDE = {"hidden-size": 64, "intermediate-size": 256, "batch-size": 8}


def line(*flags, **options):
    named = tiny_run.SIZES | {k.replace("_", "-"): v for k, v in options.items()}
    return [*(x for name, value in named.items() for x in (f"--{name}", str(value))), *flags]


def settings_of(argv):
    return config.resolve(config.parse(argv))


def run_of(argv, devices=None):
    settings = settings_of(argv)
    return make_run(settings, devices or abstract_mesh(settings.devices.mesh))


@pytest.mark.parametrize(
    "flags, options",
    [
        (["--remat"], {"optimizer": "adamw"}),
        (["--layerwise"], {"optimizer": "q_galore_adamw8bit", "rank": 8, "weights": "int8"} | WIDE),
        (
            [],
            {"optimizer": "q_galore_adamw8bit", "rank": 8, "mesh": "data=2,fsdp=2,tensor=2"} | WIDE,
        ),
    ],
    ids=["adamw", "q-galore", "mesh"],
)
@pytest.mark.sampled(1)
def test_what_is_kept_is_what_a_compiled_step_takes(flags, options):
    argv = line(*flags, **options)
    settings = settings_of(argv)
    devices = compiled.target_mesh("cpu", settings.devices.mesh)
    planned, real = run_of(argv), run_of(argv, devices)
    batch = mesh.bytes_per_device(real.batch)
    found = compiled.compile_step(real, "cpu")
    assert estimate(planned).kept == estimate(real).kept
    unread = real.state.opt_state.last_finite.dtype.itemsize  # the guard's, for people to look at
    assert estimate(planned).kept.total + batch - unread == found.arguments
    assert found.peak >= found.arguments


@pytest.mark.parametrize("options", [{}, {"mesh": "fsdp=8,tensor=2", "batch-size": 8}])
def test_roles_are_those_of_the_library(options):
    """On a mesh each array counts by its share."""
    run = run_of(line(optimizer="galore_adamw", rank=4, **options))
    kept, opt_state = estimate(run).kept, run.state.opt_state
    (lens,) = low_rank_states(opt_state)

    def local(tree):
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )

    assert kept.projectors == local(lens.projectors)
    assert kept.weights == local(run.state.params)
    assert kept.moments + kept.full_rank == local((lens.inner_state.mu, lens.inner_state.nu))
    assert kept.total == local(run.state)


def rows_of_results():
    return json.loads(RESULTS.read_text())["rows"]


def flags_of(row):
    """The command line of a row of the benchmark."""
    rank = re.search(r"r (\d+)", row["step"])
    name = {"Ada": "adamw", "8-b": "galore_adamw8bit", "Q-G": "q_galore_adamw8bit"}[row["step"][:3]]
    flags = ["--remat", *(["--layerwise", "--rank", rank[1]] if rank else [])]
    options = {
        "preset": row["model"],
        "optimizer": name,
        "weights": "int8" if name.startswith("q_") else "full",
        "dtype": "bfloat16",
        "param-dtype": "bfloat16",
        "seq-len": 2048,
        "batch-size": 1,
        "head-chunk": 256,
        "attention-chunk": 256,
        "clip": 0,
    }
    return [*flags, *(x for k, v in options.items() for x in (f"--{k}", str(v)))]


@pytest.mark.parametrize("number", range(12))
def test_the_estimate_is_within_five_percent_of_what_cuda_compiles_to(number):
    """Measured by benchmarks/compiled_memory.py, whose ordinary steps skip nothing."""
    row = rows_of_results()[number]
    found = estimate(run_of(flags_of(row)), guarded=False)
    assert found.kept.total / 1e9 == pytest.approx(row["weights and state"], rel=1e-3)
    assert found.peak / 1e9 == pytest.approx(row["peak"], rel=0.05)


def test_formulas_by_hand():
    """A model whose every size is another number."""
    argv = line("--remat", "--head-chunk", "8", optimizer="adamw", dtype="bfloat16", batch_size=2)
    s = sizes_of(run_of([*argv, "--intermediate-size", "48", "--num-layers", "3"]))
    tokens, item = 2 * 16, 2
    layer = (4 * 16 * 16 + 3 * 16 * 48) * item
    assert (s.tokens, s.layer, s.heads, s.head_tokens, s.queries) == (tokens, layer, 2, 8, 16)
    assert phases.saved(s) == 3 * tokens * 16 * item
    assert phases.logits(s) == 10 * 2 * 8 * tiny_run.VOCAB
    assert phases.scores(s) == 10 * 2 * 2 * 16 * 16
    assert phases.attention(s) == layer + phases.scores(s) + 12 * tokens * 16 * item
    assert phases.mlp(s) == layer + (9 * 16 + 6 * 48) * tokens * item
    params = 4 * (3 * (4 * 16 * 16 + 3 * 16 * 48 + 2 * 16) + 2 * 16 * tiny_run.VOCAB + 16)
    assert s.gradients.total == s.params == params


def test_projected_gradients_are_counted_as_they_arrive():
    options = {"optimizer": "galore_adamw", "rank": 4}
    projected, full = (
        sizes_of(run_of(line(*flags, **options))).gradients
        for flags in ([], ["--backward", "full"])
    )
    # Two layers; R is [kept, 4] and the basis [projected, 4], both in fp32.
    matrices = 4 * 2 * (4 * (16 + 16) * 4 + 3 * (32 + 16) * 4)
    outside = 4 * (2 * 16 * tiny_run.VOCAB + 2 * 2 * 16 + 16)
    assert projected.total == matrices + outside
    assert full.total == 4 * 2 * (4 * 16 * 16 + 3 * 16 * 32) + outside
    assert projected.largest_low_rank == 4 * 32 * 4
    assert full.largest_low_rank == 0


def peak(*flags, **options):
    return estimate(run_of(line(*flags, **options))).peak


def test_what_saves_memory_saves_it():
    galore = {"optimizer": "galore_adamw", "rank": 8} | WIDE | {"seq-len": 256}
    assert peak("--layerwise", **galore) < peak("--remat", **galore) < peak(**galore)
    assert peak("--layerwise", weights="int8", **galore) < peak("--layerwise", **galore)
    assert peak("--layerwise", **galore | {"batch-size": 1}) < peak("--layerwise", **galore)
    assert peak("--mesh", "fsdp=4", **galore) < peak(**galore)
    assert peak("--mesh", "fsdp=4,tensor=2", **galore) < peak("--mesh", "fsdp=4", **galore)


def test_scores_are_what_their_kernel_and_their_pieces_make_them():
    run = run_of(line("--layerwise", optimizer="galore_adamw", rank=4))
    whole, pieces, flash = (
        sizes_of(run._replace(llama=dataclasses.replace(run.llama, **changes)))
        for changes in ({}, {"attention_chunk": 4}, {"attention": "cudnn"})
    )
    rest = phases.attention(flash)
    assert phases.attention(whole) - rest == phases.scores(whole) == 12 * 4 * 2 * 16 * 16
    assert phases.attention(pieces) - rest == phases.scores(pieces) == 12 * 4 * 2 * 4 * 16
    assert phases.saved(pieces) == phases.saved(whole)  # layer-wise steps compute again


def test_cards():
    assert list(fits(0)) == list(CARDS) == [8, 12, 16, 24, 48, 80]
    for size in CARDS:
        at, above = fits(size * 10**9), fits(size * 10**9 + 1)
        assert {card for card in CARDS if at[card]} == {card for card in CARDS if card >= size}
        assert {card for card in CARDS if above[card]} == {card for card in CARDS if card > size}


def test_the_peak_is_in_the_fullest_phase():
    found = Estimate(
        estimate(run_of(line(optimizer="adamw"))).kept,
        [phases.Phase("a", {"x": 3, "y": 4}), phases.Phase("b", {"x": 6})],
    )
    assert (found.fullest.name, found.peak) == ("a", found.kept.total + 7)


def test_the_command_line(capsys):
    argv = ["--preset", "7b", "--optimizer", "q_galore_adamw8bit", "--weights", "int8"]
    argv += ["--layerwise", "--seq-len", "2048", "--batch-size", "1", "--head-chunk", "256"]
    argv += ["--dtype", "bfloat16", "--param-dtype", "bfloat16", "--attention", "cudnn"]
    assert plan.main(argv) == plan.FINISHED
    text = capsys.readouterr().out
    assert "6,738,415,616 parameters, 1 x 2048 tokens" in text
    numbers = dict(re.findall(r"│ ([a-z ]+?) +│[ \d.]*│ +([\d.]+) │", text))
    terms = ["weights", "projectors", "moments", "state at full rank", "rest of the state"]
    terms += ["gradients", "saved activations", "inside one block", "logits", "update"]
    assert numbers.keys() == {*terms, "peak"}
    assert float(numbers["weights"]) == pytest.approx(7.127, abs=1e-3)
    total = sum(float(numbers[name]) for name in terms)
    assert float(numbers["peak"]) == pytest.approx(total, abs=0.01)
    assert "16 GB, 24 GB, 48 GB, 80 GB" in text and "12 GB" not in text


def test_a_compiled_step_stands_beside_the_estimate(capsys, monkeypatch):
    monkeypatch.setattr(compiled, "prepare", lambda target, devices: None)  # 8 are there
    assert plan.main(line(optimizer="adamw", compile="cpu", mesh="fsdp=2")) == plan.FINISHED
    text = capsys.readouterr().out
    assert "compiled for CPU" in text and "each of fsdp=2" in text


@pytest.mark.parametrize(
    "argv, message",
    [
        (line(accumulation=3), "--accumulation 3 does not divide --batch-size 4"),
        (line(head_chunk=5), "--head-chunk 5 does not divide --seq-len 16"),
        (line(mesh="model=2"), "--mesh model=2: no axis is called 'model'"),
        (line(mesh="fsdp=3", batch_size=3, rank=4), "--mesh fsdp=3: leaf 'blocks/attn/k/kernel'"),
        (line(mesh="data=3"), "--batch-size 4: the rows of a step are shared by data=3"),
        (line(rank=16), "none of the 7 matrices is projected: rank 16 reaches .*Choose rank < 16"),
        (line(optimizer="adamw", rank=4), "--rank: no effect on --optimizer adamw"),
        (line(attention="cudnn", hidden_size=64), "--attention cudnn: .*--dtype is float32"),
        (line(attention="cudnn", dtype="bfloat16", hidden_size=24, rank=4), "a head has 12"),
        (line(attention="cudnn", compile="cpu"), "--attention cudnn --compile"),
        (line(num_heads=3), "hidden_size 16 must be a multiple of num_heads 3"),
    ],
)
def test_refused_with_the_reason(argv, message, capsys):
    assert plan.main(argv) == plan.FAILED
    error = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert re.search("ERROR: .*" + message, error)


def test_nothing_is_allocated():
    run = run_of(["--preset", "7b", "--optimizer", "galore_adamw"])
    arrays = jax.tree.leaves((run.state, run.batch))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in arrays)
    assert all(isinstance(x.sharding, NamedSharding) for x in arrays)
    assert sum(x.size for x in jax.tree.leaves(run.state.params)) == 6_738_415_616
    assert {x.dtype for x in jax.tree.leaves(run.state.params)} == {jnp.dtype("float32")}
