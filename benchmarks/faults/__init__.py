"""Faults of a training run: processes that end, disks, numbers, what does not belong together."""

from collections.abc import Callable, Iterator

from benchmarks.faults import numbers, processes, refusals, storage
from benchmarks.faults.ground import Fault, Ground

DRILLS: dict[str, Callable[[Ground], Iterator[Fault]]] = {
    "kill": processes.kill,
    "stop": processes.stop,
    "intruder": processes.intruder,
    "disk": storage.disk,
    "damage": storage.damage,
    "no_number": numbers.no_number,
    "zeros": numbers.zeros,
    "corpora": refusals.corpora,
    "another_run": refusals.another_run,
}
