"""What is known once a run's conditions are: one graph, run before the first launch for all timesteps at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dipgo_deploy.bundle.names import GUIDANCE_SCALES, TIMESTEP, run_input
from dipgo_deploy.bundle.prologue import PROLOGUE_NAME
from dipgo_deploy.bundle.shapes import Sizes, evaluate_shape
from dipgo_deploy.export.known import Found, KnownPart, Source, find_known, of_open_batch, take_out
from dipgo_deploy.export.latent import LATENT, constant, prepend
from dipgo_deploy.export.timestep_tables import WORTH_SHARE, TimestepTables
from dipgo_deploy.export.vectorised import for_all, vectorise

if TYPE_CHECKING:
    import onnx_ir as ir

    from dipgo_deploy.bundle.shapes import SizeRanges
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
        _batch_from_condition(graph)
        vectorise(graph, {name: values for name, values in rows.items() if name in names})
        graph.name = PROLOGUE_NAME
        return ir.Model(graph, ir_version=model.ir_version, producer_name="dipgo_deploy")


def find_prologue(
    graph: ir.Graph, tables: TimestepTables | None, conditions: Sequence[InputSpec], sizes: SizeRanges | None = None
) -> Found:
    """What depends on conditions, and on the timestep where no condition has tokens or is a picture. sizes: as
    ``find_known`` has them."""
    sources = {TIMESTEP: Source.TIMESTEP, **dict.fromkeys(GUIDANCE_SCALES, Source.CONDITION)}
    sources |= dict.fromkeys(() if tables is None else tables.part.names, Source.TIMESTEP)
    sources |= {spec.name: Source.TOKENS if len(spec.shape) > 2 else Source.CONDITION for spec in conditions}
    return find_known(graph, sources, for_all, sizes=sizes)


def is_worth(found: Found, timesteps: int) -> bool:
    """Whether a prologue is the default."""
    return found.saves(WORTH_SHARE, timesteps)


def take_out_prologue(model: ir.Model, found: Found) -> Prologue:
    """Take it out of ``model``, which gets an input for each value."""
    return Prologue(take_out(model, found, run_input, None))


def _batch_from_condition(graph: ir.Graph) -> None:
    """An open batch is read off a condition, where it was read off the latent, which the graph does not have."""
    import onnx_ir as ir

    latent = next((value for value in graph.inputs if value.name == LATENT), None)
    if latent is None:
        return
    condition = next(value for value in graph.inputs if value is not latent and of_open_batch(value))
    assert condition.shape is not None and not isinstance(condition.shape[0], int)
    halves = evaluate_shape((str(condition.shape[0].value),), Sizes(1, 1, 1))
    read = ir.node("Shape", [condition], attributes={"start": 0, "end": 1}, name="prologue/rows")
    per_image = constant(graph, "prologue/halves", np.array(halves, np.int64))
    batch = ir.node("Div", [read.outputs[0], per_image], name="prologue/batch")
    for node in (read, batch):
        made = node.outputs[0]
        made.name, made.dtype, made.shape = str(node.name), ir.DataType.INT64, ir.Shape([1])
    for shape in [user for user, _ in latent.uses()]:
        for entry in [user for user, _ in shape.outputs[0].uses()]:  # the batch: ``find_known`` takes no other size
            entry.outputs[0].replace_all_uses_with(batch.outputs[0])
            graph.remove(entry, safe=True)
        graph.remove(shape, safe=True)
    graph.inputs.remove(latent)
    prepend(graph, batch)
    prepend(graph, read)
    graph.sort()
