"""Tables of what is known before the first launch: a row for each timestep of the launches, or for each timestep and
class, in one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Manifest, TensorSpec
from dipgo_deploy.bundle.names import is_table
from dipgo_deploy.bundle.prologue import made_by_prologue, run_specs
from dipgo_deploy.bundle.stored_tensors import check_tensors, open_tensors, read_tensors
from dipgo_deploy.errors import UserError

TABLES_NAME = "tables.safetensors"
_TAKER = "the graphs take"


def table_specs(bundle: Bundle) -> dict[str, TensorSpec]:
    """The inputs of all graphs that are rows of timestep tables, by name."""
    graphs = [variant.graph for variant in bundle.manifest.plan.variants]
    return {spec.name: spec for graph in graphs for spec in graph.inputs if is_table(spec.name)}


def class_specs(manifest: Manifest) -> dict[str, TensorSpec]:
    """The inputs of all graphs that are rows of tables of classes, by name."""
    made = made_by_prologue(manifest.plan)
    return {name: spec for name, spec in run_specs(manifest.plan).items() if name not in made}


class Tables:
    """The tables of an engine directory; ``rows`` by name, (timesteps, *row), bfloat16 as float32.

    Raises:
        UserError: the file is missing, or does not hold what the graphs take.
    """

    def __init__(self, bundle: Bundle) -> None:
        plan = bundle.manifest.plan
        self.specs = table_specs(bundle)
        self.of_classes = class_specs(bundle.manifest)
        self._path = bundle.path
        self._place = {timestep: place for place, timestep in enumerate(plan.table_timesteps)}
        self._class_place = {label: place for place, label in enumerate(plan.table_classes)}
        self._timestep = {launch.step: launch.timestep for launch in plan.launches}
        self.rows: Mapping[str, np.ndarray] = {}
        if self.specs or self.of_classes:
            path = (bundle.path / plan.variants[0].graph.file).parent / TABLES_NAME
            count = len(plan.table_timesteps)
            stored = {name: (count, *spec.shape) for name, spec in self.specs.items()}
            stored |= {
                name: (len(plan.table_classes), count, *spec.shape[1:]) for name, spec in self.of_classes.items()
            }
            dtypes = {name: spec.dtype for name, spec in {**self.specs, **self.of_classes}.items()}
            tables = {name: TensorSpec(name=name, shape=shape, dtype=dtypes[name]) for name, shape in stored.items()}
            self._file = open_tensors(path)
            self._tables = tables
            check_tensors(self._file, tables, _TAKER)
            self.rows = read_tensors(self._file, {name: tables[name] for name in self.specs}, _TAKER)

    def has(self, timestep: float) -> bool:
        """Whether there are rows for a timestep."""
        return timestep in self._place

    def row(self, timestep: float) -> int:
        """The row of a timestep that there are rows for."""
        return self._place[timestep]

    def at_evaluation(self, step: int) -> dict[str, np.ndarray]:
        """The rows of the timestep that graphs take at an evaluation with launches, by name."""
        place = self.row(self._timestep[step]) if self.rows else 0
        return {name: rows[place] for name, rows in self.rows.items()}

    def for_classes(self, classes: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of class ids int64 (images,), by name: (timesteps, images, *row of an image); what conditional-only
        launches take has rows of the second half of the images.

        They are read when they are asked for, a table at a time: all together may take as much as the weights.

        Raises:
            UserError: a class that has none, or the file cannot be read.
        """
        missing = [int(label) for label in classes if int(label) not in self._class_place]
        if missing:
            known = ", ".join(map(str, self._class_place))
            raise UserError(
                f"{self._path}: class {missing[0]}: was exported for the classes {known} alone; export it again with "
                "this one, or without --class-labels"
            )
        places = [self._class_place[int(label)] for label in classes]
        found = {}
        for name in self.of_classes:
            (table,) = read_tensors(self._file, {name: self._tables[name]}, _TAKER).values()
            found[name] = table[places[-self.of_classes[name].shape[0] :]].swapaxes(0, 1)
        return found
