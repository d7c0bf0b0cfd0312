"""What is known once a run's conditions are: one graph, run before the first launch for all timesteps at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dipgo_deploy.bundle.names import GUIDANCE_SCALE, TIMESTEP, run_input
from dipgo_deploy.bundle.prologue import PROLOGUE_NAME
from dipgo_deploy.export.known import Found, KnownPart, Source, find_known, take_out
from dipgo_deploy.export.timestep_tables import WORTH_SHARE, TimestepTables
from dipgo_deploy.export.vectorised import for_all, vectorise

if TYPE_CHECKING:
    import onnx_ir as ir

    from dipgo_deploy.models.family import InputSpec


@dataclass(frozen=True)
class Prologue:
    """The part of a traced model that runs once a run: a timestep's table rows and the conditions -> rows."""

    part: KnownPart

    def graph(self, timesteps: Sequence[float], tables: Mapping[str, np.ndarray]) -> ir.Model:
        """The graph for all timesteps: conditions -> ``run.NAME``, (timesteps, *row) where it depends on the timestep.

        tables: the timestep tables, float32 (timesteps, *row) by name.
        """
        import onnx_ir as ir

        model = self.part.model
        graph = ir.convenience.extract(model.graph, list(model.graph.inputs), list(model.graph.outputs))
        rows = {**tables, TIMESTEP: np.array(timesteps, np.float32)[:, None]}
        names = {str(value.name) for value in graph.inputs}
        vectorise(graph, {name: values for name, values in rows.items() if name in names})
        graph.name = PROLOGUE_NAME
        return ir.Model(graph, ir_version=model.ir_version, producer_name="dipgo_deploy")


def find_prologue(graph: ir.Graph, tables: TimestepTables | None, conditions: Sequence[InputSpec]) -> Found:
    """What depends on conditions, and on the timestep where no condition has tokens or is a picture."""
    sources = {TIMESTEP: Source.TIMESTEP, GUIDANCE_SCALE: Source.CONDITION}
    sources |= dict.fromkeys(() if tables is None else tables.part.shapes, Source.TIMESTEP)
    sources |= {spec.name: Source.TOKENS if len(spec.shape) > 2 else Source.CONDITION for spec in conditions}
    return find_known(graph, sources, for_all)


def is_worth(found: Found, timesteps: int) -> bool:
    """Whether a prologue is the default."""
    return found.saves(WORTH_SHARE, timesteps)


def take_out_prologue(model: ir.Model, found: Found) -> Prologue:
    """Take it out of ``model``, which gets an input for each value."""
    return Prologue(take_out(model, found, run_input, 1))
