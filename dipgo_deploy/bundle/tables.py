"""Tables of what depends on the timestep alone: a row for each timestep of the launches, in one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import TensorSpec
from dipgo_deploy.bundle.names import is_table
from dipgo_deploy.bundle.stored_tensors import open_tensors, read_tensors

TABLES_NAME = "tables.safetensors"


def table_specs(bundle: Bundle) -> dict[str, TensorSpec]:
    """The inputs of all graphs that are rows of tables, by name."""
    graphs = [variant.graph for variant in bundle.manifest.plan.variants]
    return {spec.name: spec for graph in graphs for spec in graph.inputs if is_table(spec.name)}


class Tables:
    """The tables of an engine directory; ``rows`` by name, (timesteps, *row), bfloat16 as float32.

    Raises:
        UserError: the file is missing, or does not hold what the graphs take.
    """

    def __init__(self, bundle: Bundle) -> None:
        plan = bundle.manifest.plan
        self.specs = table_specs(bundle)
        self._place = {timestep: place for place, timestep in enumerate(plan.table_timesteps)}
        self._timestep = {launch.step: launch.timestep for launch in plan.launches}
        self.rows: Mapping[str, np.ndarray] = {}
        if self.specs:
            path = (bundle.path / plan.variants[0].graph.file).parent / TABLES_NAME
            count = len(plan.table_timesteps)
            tables = {
                name: TensorSpec(name=name, shape=(count, *spec.shape), dtype=spec.dtype)
                for name, spec in self.specs.items()
            }
            self.rows = read_tensors(open_tensors(path), tables, "the graphs take")

    def has(self, timestep: float) -> bool:
        """Whether there are rows for a timestep."""
        return timestep in self._place

    def row(self, timestep: float) -> int:
        """The row of a timestep that there are rows for."""
        return self._place[timestep]

    def at_evaluation(self, step: int) -> dict[str, np.ndarray]:
        """What graphs take at an evaluation with launches, by name."""
        place = self.row(self._timestep[step]) if self.rows else 0
        return {name: rows[place] for name, rows in self.rows.items()}
