"""What lies in the arena, and from which launch to which: read off a launch list. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

from dipgo_deploy.bundle.manifest import PlanEntry, TensorSpec
from dipgo_deploy.bundle.names import PREDICTION, of_half, stored_name


@dataclass(frozen=True)
class StoredValue:
    """One value that a launch writes into the arena.

    Attributes:
        name: of the cache, or of what a segment passes on, as the graphs that read it have it.
        spec: shape and dtype.
        offset: bytes from the start of the arena.
        written: number of the launch.
        read: numbers of the launches that read it, in order; none where its variant writes it for other launches.
    """

    name: str
    spec: TensorSpec
    offset: int
    written: int
    read: tuple[int, ...]

    @property
    def last(self) -> int:
        """The last launch that needs it."""
        return self.read[-1] if self.read else self.written


def stored_values(plan: PlanEntry) -> tuple[StoredValue, ...]:
    """All of them, in the order in which they are written. The launch list was checked (``check_structure``)."""
    found, reads = _walk(plan)
    readers: list[list[tuple[int, str]]] = [[] for _ in found]
    for number, (launch, places) in enumerate(zip(plan.launches, reads, strict=True)):
        for name, place in zip(plan.variants[launch.variant].reads, places, strict=True):
            readers[place].append((number, name))
    return tuple(
        StoredValue(
            stored_name(name, [read for _, read in readers]),
            spec,
            offset,
            written,
            tuple(dict.fromkeys(n for n, _ in readers)),
        )
        for (name, spec, offset, written), readers in zip(found, readers, strict=True)
    )


def values_read(plan: PlanEntry) -> tuple[tuple[int, ...], ...]:
    """Of each launch what it reads, as places in ``stored_values``, in the order of its variant's reads."""
    return tuple(_walk(plan)[1])


def _walk(plan: PlanEntry) -> tuple[list[tuple[str, TensorSpec, int, int]], list[tuple[int, ...]]]:
    """What is written (output, spec, offset, number of the launch), and of each launch which of it is read."""
    found: list[tuple[str, TensorSpec, int, int]] = []
    reads: list[tuple[int, ...]] = []
    there: dict[int, int] = {}
    for number, launch in enumerate(plan.launches):
        variant = plan.variants[launch.variant]
        inputs = {spec.name: spec for spec in variant.graph.inputs}
        places = []
        for name, offset in zip(variant.reads, launch.reads, strict=True):
            # A conditional-only launch may read the second half of what lies there.
            start = offset if offset in there or not launch.reads_second_halves else offset - inputs[name].nbytes
            places.append(there[start])
        reads.append(tuple(places))
        outputs = {spec.name: spec for spec in variant.graph.outputs}
        written = [*zip(variant.writes, launch.writes, strict=True)]
        written += [] if launch.passes is None else [(PREDICTION, launch.passes)]
        for name, offset in written:
            there[offset] = len(found)
            found.append((of_half(name, launch.half), outputs[name], offset, number))
    return found, reads
