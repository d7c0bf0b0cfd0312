"""Rows that a run's conditions decide: made at its start, and kept for the runs after it with the same conditions."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping

import numpy as np

from dipgo_deploy.backends.base import ALIGNMENT, Backend, Launchable, Memory
from dipgo_deploy.backends.storage import aligned_rows, as_bytes
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Graph, LaunchEntry, Manifest, TensorSpec
from dipgo_deploy.bundle.names import GUIDANCE_SCALES
from dipgo_deploy.bundle.prologue import class_name, made_by_prologue, run_specs
from dipgo_deploy.bundle.shapes import Sizes
from dipgo_deploy.bundle.tables import Tables
from dipgo_deploy.plan.buffers import aligned
from dipgo_deploy.runtime.component import MOST_SIZES
from dipgo_deploy.runtime.graphs import Graphs
from dipgo_deploy.schedule.guidance import HALVES, Half

Given = Mapping[str, np.ndarray]
# Of which half of guidance, or None for all of it, and the input that takes it.
Row = tuple[Half | None, str]
# Of the prologue's rows for earlier conditions: what is kept of them on the host. DiT-XL/2 has 1.5 MiB a launch.
KEPT_BYTES = 2**27
# Conditions that are known to have been there although their rows were not kept: digests of 32 bytes.
_MOST_SEEN = 4096


class KeptRows:
    """Copies of rows for conditions that were asked for before, ``KEPT_BYTES`` of them in all.

    While there is room all are kept, so that conditions that take turns from the start make their rows once. Older ones
    make way only for conditions that are seen again: where all differ, no more than ``KEPT_BYTES`` is ever copied.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, dict[Row, np.ndarray]] = OrderedDict()
        self._nbytes = 0
        self._seen: OrderedDict[bytes, None] = OrderedDict()  # of what was not kept

    def keep(self, given: Given, rows: Callable[[], dict[Row, np.ndarray]], nbytes: int) -> None:
        """Keep rows of ``nbytes`` that a run made; ``rows`` is called only where they are kept."""
        key = digest(given)
        if nbytes > KEPT_BYTES or key in self._kept:
            return
        if self._nbytes + nbytes > KEPT_BYTES and not self._seen_before(key):
            return
        while self._nbytes + nbytes > KEPT_BYTES:
            self._nbytes -= _bytes(self._kept.popitem(last=False)[1])
        self._kept[key] = rows()
        self._nbytes += nbytes

    def _seen_before(self, key: bytes) -> bool:
        if key in self._seen:
            del self._seen[key]
            return True
        self._seen[key] = None
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return False

    def of(self, given: Given) -> dict[Row, np.ndarray] | None:
        """The rows for these conditions, None where there are none."""
        key = digest(given)
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)


def digest(given: Given) -> bytes:
    """sha256 of conditions: names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(given):
        array = np.ascontiguousarray(given[name])
        found.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        found.update(as_bytes(array).data)
    return found.digest()


def _bytes(rows: Mapping[Row, np.ndarray]) -> int:
    return sum(array.nbytes for array in rows.values())


class RunRows:
    """The rows of an engine directory that are made at the start of a run: by its prologue, or of tables of classes.

    The prologue's graph is loaded for a run whose conditions differ from those before, and goes after its first run:
    then its weights take no memory. From the second run of it on it stays, because there will be more. What it made
    for the conditions of earlier runs is kept (``KeptRows``), so that runs whose conditions take turns make it once.
    Where launches have one half of guidance, so have the rows, and the prologue runs once for each half.

    bound: where its inputs are, those of both halves one after the other. graphs: what is loaded, on the same
    backend. Raises UserError as ``DenoisingLoop``.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        tables: Tables,
        bound: Mapping[str, Memory],
        graphs: Graphs,
    ) -> None:
        self._bundle, self._backend, self._tables, self._bound, self._graphs = bundle, backend, tables, bound, graphs
        plan = bundle.manifest.plan
        made = made_by_prologue(plan)
        self._place = {timestep: place for place, timestep in enumerate(plan.table_timesteps)}
        # What no launch takes is written all the same.
        sizes = {name: spec.nbytes for name, spec in made.items()}
        for name, spec in run_specs(plan).items():
            sizes.setdefault(name, len(plan.table_timesteps) * aligned(spec.nbytes, ALIGNMENT))
        self._memory = {(half, name): backend.allocate(size) for half in plan.halves for name, size in sizes.items()}
        self._key: Given | None = None
        self._made: dict[str, TensorSpec] = {}  # by the prologue, at the sizes of the last run
        self._kept = KeptRows()
        self._calls: dict[Sizes, list[Launchable]] = {}

    @property
    def timed(self) -> bool:
        """Whether any row is of one timestep."""
        made = made_by_prologue(self._bundle.manifest.plan)
        specs = run_specs(self._bundle.manifest.plan)
        return any(name not in made or made[name].shape != spec.shape for name, spec in specs.items())

    def at(self, manifest: Manifest) -> Callable[[LaunchEntry], dict[str, Memory]]:
        """What gives of a launch the rows that its graph may take, by input. manifest: at the sizes of the run."""
        made = made_by_prologue(manifest.plan)
        specs = run_specs(manifest.plan)  # of all graphs: once, not for each launch
        halves = manifest.plan.halves

        def of(launch: LaunchEntry) -> dict[str, Memory]:
            if launch.half not in halves:
                return {}  # it guides
            place = self._place.get(launch.timestep, 0)
            found = {}
            for name, spec in specs.items():
                memory = self._memory[launch.half, name]
                if name not in made:
                    found[name] = memory.at(place * aligned(spec.nbytes, ALIGNMENT), spec.nbytes)
                else:
                    for_each = made[name].shape != spec.shape
                    found[name] = memory.at(place * spec.nbytes if for_each else 0, spec.nbytes)
            return found

        return of

    def fill(self, manifest: Manifest, conditions: Given, scales: Mapping[str, float]) -> None:
        """Make the rows of a run, unless they are those of the one before; its conditions are uploaded already.

        manifest: at the sizes of the run. conditions: each by name. scales: of the guidance, by the input that takes
        it.

        Raises:
            UserError: the graph cannot be loaded or run, or a class that has no rows.
        """
        prologue = manifest.plan.prologue
        names = {spec.name for spec in (() if prologue is None else prologue.inputs)}
        label = class_name(manifest) if self._tables.of_classes else None
        taken = (*sorted(names - {*GUIDANCE_SCALES}), *([label] if label else []))
        given = {name: conditions[name] for name in taken}
        given |= {name: np.array([scale], np.float32) for name, scale in scales.items() if name in names}
        if not given or _equal(self._key, given):
            return
        if self._key is not None and prologue is not None:
            nbytes = len(manifest.plan.halves) * sum(spec.nbytes for spec in self._made.values())
            self._kept.keep(self._key, self._copies, nbytes)
        self._key = None
        if label is not None:
            self._gather(manifest, conditions[label])
        if prologue is not None:
            self._made = made_by_prologue(manifest.plan)
            kept = self._kept.of(given)
            if kept is None:
                self._run(manifest, prologue)
            else:
                for row, rows in kept.items():
                    self._backend.upload(self._memory[row], rows)
        self._key = {name: np.array(array) for name, array in given.items()}

    def load(self) -> None:
        """Load the prologue's graph, where there is one that has not run yet."""
        prologue = self._bundle.manifest.plan.prologue
        if prologue is not None and not self._graphs.loads[prologue.file]:
            self._graphs.get(self._bundle, prologue)

    def _copies(self) -> dict[Row, np.ndarray]:
        """The bytes that the prologue wrote."""
        raw = {name: TensorSpec(name=name, shape=(s.nbytes // 2,), dtype="float16") for name, s in self._made.items()}
        return {row: self._backend.download(self._memory[row], raw[row[1]]) for row in self._memory if row[1] in raw}

    def _run(self, manifest: Manifest, prologue: Graph) -> None:
        """prologue: at the sizes of the run."""
        calls = self._calls.get(manifest.usual_sizes)
        if calls is None:
            while len(self._calls) >= MOST_SIZES:
                del self._calls[next(iter(self._calls))]
            bind = self._graphs.get(self._bundle, prologue).bind
            every = [self._tensors(prologue, half) for half in manifest.plan.halves]
            calls = [bind(tensors) if prologue.sizes is None else bind(tensors, prologue) for tensors in every]
            self._calls[manifest.usual_sizes] = calls
        for call in calls:
            call()
        self._backend.synchronize()  # else a captured loop would have it in it
        if self._graphs.loads[prologue.file] == 1:
            self._calls.clear()
            self._graphs.release(prologue)

    def _tensors(self, prologue: Graph, half: Half | None) -> dict[str, Memory]:
        """Where inputs and outputs of the prologue are; prologue: at the sizes of the run."""
        found = {name: memory for (of, name), memory in self._memory.items() if of == half}
        for spec in prologue.inputs:
            memory = self._bound[spec.name]
            found[spec.name] = memory if spec.name in GUIDANCE_SCALES else rows_of(memory, spec, half)
        return found

    def _gather(self, manifest: Manifest, classes: np.ndarray) -> None:
        for half, own in zip(manifest.plan.halves, np.split(classes, len(manifest.plan.halves)), strict=True):
            for name, rows in self._tables.for_classes(own).items():
                spec = self._tables.of_classes[name]
                self._backend.upload(self._memory[half, name], aligned_rows(rows, spec.dtype, ALIGNMENT))


def rows_of(memory: Memory, spec: TensorSpec, half: Half | None) -> Memory:
    """Where the rows of a half of guidance lie in a condition, or all of them; spec: as graphs take it."""
    return memory if half is None else memory.at(HALVES.index(half) * spec.nbytes, spec.nbytes)


def _equal(before: Given | None, now: Given) -> bool:
    return (
        before is not None
        and before.keys() == now.keys()
        and all(before[name].shape == now[name].shape and np.array_equal(before[name], now[name]) for name in now)
    )
