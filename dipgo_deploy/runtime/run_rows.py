"""Rows that a run's conditions decide: made at its start, and kept for the runs after it with the same conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from dipgo_deploy.backends.base import ALIGNMENT, Backend, ChangedWeights, Executable, Launchable, Memory
from dipgo_deploy.backends.storage import aligned_rows
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import LaunchEntry, Manifest
from dipgo_deploy.bundle.names import GUIDANCE_SCALES
from dipgo_deploy.bundle.prologue import class_name, made_by_prologue, run_specs
from dipgo_deploy.bundle.shapes import Sizes
from dipgo_deploy.bundle.tables import Tables
from dipgo_deploy.plan.buffers import aligned
from dipgo_deploy.runtime.component import MOST_SIZES

Given = Mapping[str, np.ndarray]


class RunRows:
    """The rows of an engine directory that are made at the start of a run: by its prologue, or of tables of classes.

    The prologue's graph is loaded for a run whose conditions differ from those before, and goes after its first run:
    then its weights take no memory. From the second run of it on it stays, because there will be more.

    bound: where its inputs are. Raises UserError as ``DenoisingLoop`` does.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        tables: Tables,
        bound: Mapping[str, Memory],
        weights: ChangedWeights | None,
    ) -> None:
        self._bundle, self._backend, self._tables, self._bound, self._weights = bundle, backend, tables, bound, weights
        plan = bundle.manifest.plan
        made = made_by_prologue(plan)
        self._place = {timestep: place for place, timestep in enumerate(plan.table_timesteps)}
        self._memory: dict[str, Memory] = {}
        for name, spec in run_specs(plan).items():
            rows = len(plan.table_timesteps)
            nbytes = made[name].nbytes if name in made else rows * aligned(spec.nbytes, ALIGNMENT)
            self._memory[name] = backend.allocate(nbytes)
        for name, spec in made.items():  # what no launch takes is written all the same
            if name not in self._memory:
                self._memory[name] = backend.allocate(spec.nbytes)
        self._key: Given | None = None
        self._executable: Executable | None = None
        self._calls: dict[Sizes, Launchable] = {}
        self._runs = 0

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

        def of(launch: LaunchEntry) -> dict[str, Memory]:
            place = self._place.get(launch.timestep, 0)
            found = {}
            for name, spec in specs.items():
                if name not in made:
                    found[name] = self._memory[name].at(place * aligned(spec.nbytes, ALIGNMENT), spec.nbytes)
                else:
                    for_each = made[name].shape != spec.shape
                    found[name] = self._memory[name].at(place * spec.nbytes if for_each else 0, spec.nbytes)
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
        self._key = None
        if label is not None:
            self._gather(conditions[label])
        if prologue is not None:
            self._run(manifest)
        self._key = {name: np.array(array) for name, array in given.items()}

    def load(self) -> None:
        """Load the prologue's graph, where there is one and it has not run yet."""
        if self._bundle.manifest.plan.prologue is not None and not self._runs:
            self._loaded()

    def _loaded(self) -> Executable:
        prologue = self._bundle.manifest.plan.prologue
        assert prologue is not None
        if self._executable is None:
            self._executable = self._backend.load(self._bundle.path, prologue, self._weights)
            self._bundle.check_unchanged()
        return self._executable

    def _run(self, manifest: Manifest) -> None:
        prologue = manifest.plan.prologue
        assert prologue is not None
        executable = self._loaded()
        call = self._calls.get(manifest.usual_sizes)
        if call is None:
            while len(self._calls) >= MOST_SIZES:
                del self._calls[next(iter(self._calls))]
            tensors = {**self._bound, **self._memory}
            bind = executable.bind
            call = bind(tensors) if prologue.sizes is None else bind(tensors, prologue)
            self._calls[manifest.usual_sizes] = call
        call()
        self._backend.synchronize()  # else a captured loop would have it in it
        self._runs += 1
        if self._runs == 1:
            self._executable = None
            self._calls.clear()
            self._backend.release(executable)

    def _gather(self, classes: np.ndarray) -> None:
        for name, rows in self._tables.for_classes(classes).items():
            spec = self._tables.of_classes[name]
            self._backend.upload(self._memory[name], aligned_rows(rows, spec.dtype, ALIGNMENT))


def _equal(before: Given | None, now: Given) -> bool:
    return (
        before is not None
        and before.keys() == now.keys()
        and all(before[name].shape == now[name].shape and np.array_equal(before[name], now[name]) for name in now)
    )
