"""Tables of what depends on the timestep alone: a row for each timestep of the launches, in one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import TensorSpec
from dipgo_deploy.bundle.names import is_table
from dipgo_deploy.bundle.safetensors_file import TensorFile
from dipgo_deploy.errors import UserError

TABLES_NAME = "tables.safetensors"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}


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
            self.rows = _read(path, self.specs, len(plan.table_timesteps))

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


def _read(path: Path, specs: Mapping[str, TensorSpec], count: int) -> dict[str, np.ndarray]:
    advice = "export the engine directory again"
    try:
        tensors = TensorFile(path).tensors
        found = {}
        for name, spec in specs.items():
            tensor, shape = tensors[name], (count, *spec.shape)
            if (tensor.shape, tensor.dtype) != (shape, _DTYPES[spec.dtype]):
                raise UserError(
                    f"{path}: {name} is {tensor.dtype} {tensor.shape}, the graphs take {spec.dtype} {shape}; {advice}"
                )
            found[name] = tensor.read()
        return found
    except KeyError as error:
        raise UserError(f"{path}: has no table {error.args[0]}; {advice}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {advice}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; {advice}") from None
