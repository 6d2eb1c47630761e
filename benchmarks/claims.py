"""What the README says, and which result says so: a rule for each table, and for each sentence."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
Cells = list[tuple[float, ...]]
Row = dict[str, Any]


class Table(NamedTuple):
    """A table of the README.

    Args:
      header: How its first line begins.
      expected: From the cells of a line the figures of the cells that are not labels; KeyError if
        no result has such a line.
      labels: Which cells are labels.
    """

    header: str
    expected: Callable[[Sequence[str]], Cells]
    labels: tuple[int, ...] = (0,)


class Sentence(NamedTuple):
    """A regex with a group for each figure, and the figures."""

    pattern: str
    expected: Callable[[], Sequence[float]]


def tables(text: str) -> Iterator[tuple[str, list[list[str]]]]:
    """First line and cells of the others, of every table of a Markdown text."""
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        header, _, *lines = block.splitlines()
        yield header, [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def figures(cell: str) -> list[str]:
    """The numbers of a cell, but for the number of seeds."""
    return re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", re.sub(r"\(\d+ seeds?\)", "", cell))


def plain(cell: str) -> str:
    """A cell without its markup."""
    return cell.replace("`", "").replace("*", "").strip()


def result(table: str, **where: Any) -> Row:
    """The one row of a result whose columns are as said."""
    found = [row for row in _rows(table) if all(row[key] == value for key, value in where.items())]
    if len(found) != 1:
        raise KeyError(f"{len(found)} rows of {table} with {where}")
    return found[0]


def _rows(table: str) -> list[Row]:
    return json.loads((RESULTS / f"{table}.json").read_text())["rows"]


def learned(variant: str, rate: str) -> Row:
    """A line of the comparison: loss (with its spread), perplexity, megabytes of state."""
    cells = _line("learning", [variant, rate])
    names = {"loss": 2, "perplexity": 3, "state": 4}
    return {name: _floats(cells[column]) for name, column in names.items()}


def learned_in_few_bits(variant: str) -> Row:
    """Loss (with its spread) and refreshes of each seed."""
    cells = _line("learning_in_few_bits", [variant])
    return {"loss": _floats(cells[3]), "refreshes": _floats(cells[4])}


def _line(table: str, labels: list[str]) -> list[str]:
    for _, lines in tables((RESULTS / f"{table}.md").read_text()):
        for line in lines:
            cells = [plain(cell) for cell in line]
            if cells[: len(labels)] == labels:
                return cells
    raise KeyError(f"{', '.join(labels)} in {table}")


def _floats(cell: str) -> tuple[float, ...]:
    return tuple(float(figure.replace(",", "")) for figure in figures(cell))


def size_and_rank(label: str) -> tuple[str, int]:
    """``60M (128)`` and ``60M (r 128)``."""
    name, rank = re.fullmatch(r"(\w+) \((?:r )?(\d+)\)", label).groups()  # type: ignore[union-attr]
    return name, int(rank)


def _present(*values: float | str) -> tuple[float, ...]:
    return tuple(float(value) for value in values if value != "" and value != 0)


def _memory(labels: Sequence[str]) -> Cells:
    name, rank = size_and_rank(labels[0])
    row = result("memory", model=name.lower(), rank=rank)
    recipes = ("AdamW", "GaLore", "8-bit GaLore", "Q-GaLore")
    return [_present(row[recipe], row[f"{recipe}, paper"]) for recipe in recipes]


_LENS = "galore_adamw:rank=0.25"
_LEARNING = {
    "galore_adamw, rank 48 of 192, transport=rotate": (f"{_LENS},transport=rotate", "0.01"),
    "galore_adamw, rank 48 of 192, as it comes": (_LENS, "0.01"),
    "AdamW, matrices at a quarter of the rate": ("adamw:matrix-lr-scale=0.25", "0.003"),
    "AdamW": ("adamw", "0.001"),
}


def _learning(labels: Sequence[str]) -> Cells:
    variant, rate = _LEARNING[labels[0]]
    row = learned(variant, rate)
    return [(float(rate),), row["loss"], row["perplexity"], row["state"]]


def _optimizer_step(labels: Sequence[str]) -> Cells:
    name, rank = size_and_rank(labels[0])
    table = "optimizer_step_1b" if name == "1B" else "optimizer_step"
    row = result(table, block=name, rank=rank, optimizer=labels[1])
    columns = (
        "warm refresh, times faster",
        "cold refresh, times faster",
        "step / optax",
        "step / two products",
        "mean step at gap 200 / step",
    )
    return [(row[column],) for column in columns]


def _training(labels: Sequence[str]) -> Cells:
    preset = re.match(r"\w+", labels[0])[0].lower()  # type: ignore[index]
    timed = "tokens/s" in labels[0]
    table, column = (
        ("training_step", "tokens/s ÷ AdamW") if timed else ("training_flops", "÷ AdamW")
    )
    methods = (
        "AdamW",
        "GaLore, full gradient",
        "GaLore, projected backward",
        "GaLore, layer-wise",
    )
    return [(result(table, preset=preset, method=method)[column],) for method in methods]


def _energy(labels: Sequence[str]) -> Cells:
    row = result("captured_energy", projector=labels[0])
    spectra = ("power", "exp", "flat")
    return [(row[f"{spectrum}, {start}"],) for spectrum in spectra for start in ("cold", "warm")]


_ROLES = {
    "AdamW, bf16": "AdamW",
    "galore_adamw, bf16": "GaLore",
    "galore_adamw8bit": "8-bit GaLore",
    "q_galore_adamw8bit, INT8 weights": "Q-GaLore",
}


def _roles(labels: Sequence[str]) -> Cells:
    row = result("memory_by_role", model="7b", recipe=_ROLES[labels[0]])
    return [_present(row[column]) for column in ("weights", "projectors", "moments", "total")]


def _compiled(labels: Sequence[str]) -> Cells:
    name, rank = size_and_rank(labels[0])
    steps = (
        "AdamW",
        f"8-bit GaLore, r {rank}, layer-wise",
        f"Q-GaLore, r {rank}, layer-wise",
        f"Q-GaLore, r {rank // 2}, layer-wise",
    )
    return [(result("compiled_memory", model=name.lower(), step=step)["peak"],) for step in steps]


_LAYERS = {
    "stacked layers": "stacked",
    "separate layers": "separate",
    "stacked, layer-wise": "stacked, layer-wise",
}


def _unrolled(labels: Sequence[str]) -> Cells:
    layers = _LAYERS[labels[0]]
    return [
        (result("unrolled_h100", model="350m", optimizer=o, layers=layers, clip=c)["temporaries"],)
        for o in ("AdamW", "GaLore")
        for c in ("", "exact")
    ]


def _states(labels: Sequence[str]) -> Cells:
    name, rank = size_and_rank(labels[0])
    row = result("state_bytes", model=name.lower(), rank=rank)
    columns = (
        "optax.adamw",
        "galore_adamw",
        "bf16 projectors",
        "side=long, bf16",
        "galore_adafactor, bf16",
    )
    return [(row[column],) for column in columns]


_INT8 = "q_galore_adamw8bit-rank_0.25-weights_int8"
_FEW_BITS = {
    "q_galore_adamw8bit, INT8 weights, stochastic rounding": f"{_INT8}-lr_0.01",
    "the same with --rounding nearest": f"{_INT8}-rounding_nearest-lr_0.01",
    "AdamW, 2 M tokens": "adamw-lr_0.001",
    "AdamW with 8-bit moments, 2 M tokens": "adamw8bit-lr_0.001",
}


def _few_bits(labels: Sequence[str]) -> Cells:
    if labels[0] == "galore_adamw, everything in fp32":
        return [learned(_LENS, "0.01")["loss"]]
    return [learned_in_few_bits(_FEW_BITS[labels[0]])["loss"]]


def _moments(labels: Sequence[str]) -> Cells:
    name = "galore_jax 8-bit" if labels[0] == "galore_jax" else labels[0].split()[0]
    row = result("moment_accuracy", moments=name)
    return [(100 * row[f"{leaf}, mean"],) for leaf in ("q", "gate", "embedding")]


def _quantized(labels: Sequence[str]) -> Cells:
    update = labels[0].replace("… with INT4", "+ int4").replace("… with", "+")
    return [
        (result("quantized_step", block="350M", what=what, variant=variant)["times the first"],)
        for what, variant in (("tx.update", update), ("apply_updates", labels[1]))
    ]


NOT_MEASURED = ("| choice | default |", "| | optimizer | learning rate |", "| there | here |")
TABLES = (
    Table("| model (rank) | AdamW, bf16 moments |", _memory),
    Table("| | best rate | validation loss |", _learning),
    Table("| block | optimizer | warm refresh", _optimizer_step, (0, 1)),
    Table("| | AdamW | GaLore, full gradient |", _training),
    Table("| projector | power, cold |", _energy),
    Table("| GB | weights | bases |", _roles),
    Table("| model | AdamW, bf16 moments | 8-bit GaLore, layer-wise |", _compiled),
    Table("| 350M, temporaries in GB |", _unrolled),
    Table("| model (rank) | AdamW | `galore_adamw` |", _states),
    Table("| | validation loss |", _few_bits),
    Table("| | query kernel |", _moments),
    Table("| `tx.update` |", _quantized, (0, 2)),
)


def _compile_times() -> list[float]:
    ours, apart, theirs = (
        result("compile_time", update=update)
        for update in (
            "galore_jax, stacked layers",
            "galore_jax, separate layers",
            "optax.contrib.galore, separate layers",
        )
    )
    return [ours["min"], apart["min"], apart["leaves"], theirs["min"]]


def _slowest() -> list[float]:
    column = "slowest / median"
    policies = ("staggered(gap=25)", "every(gap=25)")
    return [result("staggered", refresh=policy)[column] for policy in policies]


def _accumulated() -> list[float]:
    row = result("accumulate_buffers", model="7b")
    return [row["accumulate, q_galore_adamw8bit"], row["MultiSteps"]]


def _reduced() -> list[float]:
    most, other = (
        result("communication", block=block) for block in ("7B (r 1024)", "130M (r 256)")
    )
    return [row[column] for column in ("ratio", "mean at gap 200 / full") for row in (most, other)]


def _adaptive() -> list[float]:
    often = learned_in_few_bits("galore_adamw-rank_0.25-gap_10-lr_0.01")
    seldom = learned_in_few_bits("galore_adamw-rank_0.25-refresh_adaptive-gap_10-lr_0.01")
    return [*seldom["refreshes"], *often["refreshes"], *seldom["loss"], *often["loss"]]


def _roundings() -> list[float]:
    nearest = learned_in_few_bits(f"{_INT8}-rounding_nearest-lr_0.001")
    stochastic = learned_in_few_bits(f"{_INT8}-lr_0.001")
    return [*nearest["loss"], *stochastic["loss"], *_losses((_LENS, "0.001"))]


def _losses(*variants: tuple[str, str]) -> list[float]:
    return [value for variant in variants for value in learned(*variant)["loss"]]


def _share_of_state() -> list[float]:
    ours, adamw = (learned(name, "0.01")["state"][0] for name in (_LENS, "adamw"))
    return [100 * ours / adamw]


def _survived() -> list[float]:
    """Of the kills, and of all other faults: how many were survived, and how many there were."""
    held = _rows("drills")
    if skipped := [row["fault"] for row in held if not row["times"]]:
        raise KeyError(f"drills that were not held: {skipped}")
    kills = [row for row in held if row["drill"] == "kill"]
    others = [row for row in held if row["drill"] != "kill"]
    return [
        sum(row[column] for row in rows)
        for rows in (kills, others)
        for column in ("survived", "times")
    ]


SENTENCES = (
    Sentence(r"(\d+) of (\d+) kills .*? and (\d+) of (\d+) other faults", _survived),
    Sentence(
        r"Adam state for a 7B model is (\d+) GB",
        lambda: [result("state_bytes", model="7b")["optax.adamw"]],
    ),
    Sentence(r"projected matrices: (\d+) % of AdamW's", _share_of_state),
    Sentence(
        r"the other two being at ([\d.]+) and ([\d.]+) at 1e-3",
        lambda: _losses((_LENS, "0.001"), ("adamw:matrix-lr-scale=0.25", "0.001")),
    ),
    Sentence(
        r"compiles in ([\d.]+) s when the layers are stacked \(([\d.]+) s as (\d+) separate "
        r"leaves\), .*? in ([\d.]+) s",
        _compile_times,
    ),
    Sentence(r"takes ([\d.]+) times the median one, with .*? ([\d.]+) times", _slowest),
    Sentence(
        r"full gradients take, ([\d.]+) at the ranks above \(130M: ([\d.]+)\), and ([\d.]+) "
        r"\(([\d.]+)\) with a refresh",
        _reduced,
    ),
    Sentence(r"adds ([\d.]+) GB to a 7B .*? adds (\d+)", _accumulated),
    Sentence(
        r"ends at ([\d.]+), stochastic rounding at ([\d.]+), fp32 weights at ([\d.]+)",
        _roundings,
    ),
    Sentence(
        r"all take ([\d.]+) bytes per entry",
        lambda: [result("moment_accuracy", moments="galore_jax 8-bit")["bytes per entry"]],
    ),
    Sentence(
        r"a 7B step leaves ([\d.]+) GB of a 16 GB card .*? ([\d.]+) GB of a 12 GB card",
        lambda: [16 - _compiled(["7B (1024)"])[2][0], 12 - _compiled(["7B (1024)"])[3][0]],
    ),
    Sentence(
        r"refreshed ([\d,]+) times where .*? did ([\d,]+) times, and ended at ([\d.]+) against "
        r"([\d.]+)\.",
        _adaptive,
    ),
    Sentence(
        r"`keep` with `gram_eigh` ([\d.]+) ± ([\d.]+) .*?`rotate` ([\d.]+) ± ([\d.]+) "
        r".*?`align` ([\d.]+) ± ([\d.]+) .*?`reset` ([\d.]+) and `side=\"long\"` ([\d.]+) ",
        lambda: _losses(
            (f"{_LENS},projector=gram_eigh,transport=keep", "0.01"),
            (f"{_LENS},transport=rotate", "0.01"),
            (_LENS, "0.01"),
            (f"{_LENS},transport=reset", "0.01"),
            (f"{_LENS},side=long", "0.01"),
        ),
    ),
)
