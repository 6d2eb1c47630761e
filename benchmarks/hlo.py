"""What a compiled program sends between devices."""

import dataclasses
import math
import re

_BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}
_COLLECTIVE = re.compile(r"= (.*?) (?:all-reduce|all-gather|reduce-scatter)(?:-start)?\(")
_BRANCHES = re.compile(r"(?:branch_computations=\{(.*?)\}|(?:true|false)_computation=%?([\w.-]+))")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")


@dataclasses.dataclass
class _Computation:
    """One function of a program."""

    sent: int = 0
    calls: list[str] = dataclasses.field(default_factory=list)
    branches: list[str] = dataclasses.field(default_factory=list)


def bytes_reduced(text: str) -> tuple[int, int]:
    """Bytes of all arrays that are reduced or gathered, loops counted once.

    Args:
      text: HLO of a compiled program, as ``compiled.as_text()`` gives it.

    Returns:
      Bytes on every step, and bytes inside the branches of conditionals.
    """
    computations, entry = _parse(text)
    always = _reachable(computations, [entry], lambda c: c.calls)
    everything = _reachable(computations, [entry], lambda c: c.calls + c.branches)
    sent = sum(computations[name].sent for name in always)
    return sent, sum(computations[name].sent for name in everything) - sent


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current, entry = _Computation(), ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if head and not line.startswith(" "):
            current = computations[head[2]] = _Computation()
            entry = head[2] if head[1] else entry
            continue
        collective = _COLLECTIVE.search(line)
        if collective:
            current.sent += _size(collective[1])
        for several, one in _BRANCHES.findall(line):
            current.branches += [one] if one else re.findall(r"[\w.-]+", several)
        current.calls += _CALLS.findall(line)
    return computations, entry


def _size(shapes: str) -> int:
    found = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return sum(
        _BYTES[dtype] * math.prod(int(n) for n in axes.split(",") if n) for dtype, axes in found
    )


def _reachable(computations: dict[str, _Computation], start: list[str], steps) -> set[str]:
    seen, todo = set(), list(start)
    while todo:
        name = todo.pop()
        if name in computations and name not in seen:
            seen.add(name)
            todo += steps(computations[name])
    return seen
