"""What depends on the timestep alone, taken out of a traced graph and computed at export.

An engine directory fixes the timesteps of its launches. So everything that reads nothing but the timestep (its
embedding, and the scales, shifts and gates that are made of it) is known before the first launch: a table holds a row
of each such value for each timestep, and the weights that made it leave the graphs. The same holds of what reads the
timestep and a class, where the classes are fixed at export, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dipgo_deploy.bundle.names import TIMESTEP, run_input, table_input
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.dynamic import concrete
from dipgo_deploy.export.known import KnownPart, Source, extents_of, find_known, nbytes_of, take_out
from dipgo_deploy.export.latent import LATENT

if TYPE_CHECKING:
    import onnx_ir as ir

    from dipgo_deploy.bundle.shapes import SizeRanges

# Below this share of the weights tables are not the default: a LoRA can no longer change what they are made of.
WORTH_SHARE = 0.05
# Images of which an open batch's rows are made: they have to be alike.
_SEVERAL = 2


@dataclass(frozen=True)
class TimestepTables:
    """The part of a traced model that became tables: timestep float32 (1,) -> a row of each.

    sizes: of the latent that an open batch is read off, where it is.
    """

    part: KnownPart
    sizes: tuple[int, ...] = ()

    def rows(self, timesteps: Sequence[float]) -> dict[str, np.ndarray]:
        """The tables: float32 (timesteps, *row) by name; raises as ``KnownPart.rows`` does."""
        points = {TIMESTEP: [np.array([timestep], np.float32) for timestep in timesteps]}
        if self.sizes:
            points[LATENT] = [np.zeros(self.sizes, np.float32)] * len(timesteps)
        return self.part.rows(points, "give --no-timestep-tables")


def take_out_tables(
    model: ir.Model, images: int, *, always: bool, sizes: SizeRanges | None = None, half: int | None = None
) -> TimestepTables | None:
    """Take what depends on the timestep alone out of ``model``, which gets an input for each value; None, and nothing
    is changed, where there is nothing or (unless ``always``) where it is not worth it.

    A value that has a row for each of the ``images`` of a launch, all alike, becomes one row; also where ``sizes``
    leave their number open. half: images of a conditional-only launch, where there are any.
    """
    found = find_known(model.graph, {TIMESTEP: Source.TIMESTEP}, sizes=sizes)
    if not found.frontier or (not always and found.nbytes < WORTH_SHARE * found.total):
        return None
    part = take_out(model, found, table_input, images, half=half)
    latent = next((value for value in part.model.graph.inputs if value.name == LATENT), None)
    if latent is None or sizes is None:
        return TimestepTables(part)
    return TimestepTables(part, concrete(latent, sizes.min._replace(batch=_SEVERAL)))


@dataclass(frozen=True)
class ClassTables:
    """The part of a traced model that became tables for some classes.

    Attributes:
        part: timestep, rows of timestep tables and class ids -> a row of each.
        name: of the input with the class ids, int64 (images of a launch,).
        classes: the class ids, the null class among them where guidance needs it.
    """

    part: KnownPart
    name: str
    classes: tuple[int, ...]

    def rows(self, timesteps: Sequence[float], tables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tables: float32 (classes, timesteps, *row) by name, a row being of one image.

        tables: the timestep tables.

        Raises:
            UserError: images of one class would get different rows.
        """
        points: dict[str, list[np.ndarray]] = {}
        count = len(timesteps)
        given: list[np.ndarray]
        for value in self.part.model.graph.inputs:
            if value.name == self.name:
                given = [np.full(extents_of(value), label, np.int64) for label in self.classes for _ in range(count)]
            elif value.name == TIMESTEP:
                given = [np.array([timestep], np.float32) for timestep in timesteps] * len(self.classes)
            else:
                given = [*tables[str(value.name)]] * len(self.classes)
            points[str(value.name)] = given
        rows = self.part.rows(points, "leave out --class-labels")
        return {name: table.reshape(-1, count, *table.shape[2:]) for name, table in rows.items()}


def take_out_classes(
    model: ir.Model,
    tables: TimestepTables | None,
    name: str,
    classes: Sequence[int],
    images: int,
    timesteps: int,
    half: int | None = None,
) -> ClassTables:
    """Take what depends on the class ids ``name`` and the timestep alone out of ``model``, which gets an input, with a
    row for each of the ``images`` of a launch, for each value.

    timesteps: how many there may be. half: images of a conditional-only launch, where there are any.

    Raises:
        UserError: there is nothing, or the tables would take more than the weights that they replace.
    """
    sources = {TIMESTEP: Source.TIMESTEP, name: Source.CONDITION}
    sources |= dict.fromkeys(() if tables is None else tables.part.shapes, Source.TIMESTEP)
    found = find_known(model.graph, sources)
    if not found.frontier:
        raise UserError("--class-labels: no product of the model depends on the class alone; leave it out")
    for value in found.frontier:
        if extents_of(value)[:1] not in ((images,), (half,)):
            raise UserError(f"--class-labels: {value.name} has no row for each image; leave it out")
    of_an_image = sum(nbytes_of(value) // extents_of(value)[0] for value in found.frontier)
    needed = of_an_image * timesteps * len(classes)
    if needed > found.nbytes:
        raise UserError(
            f"--class-labels: tables of {len(classes)} classes and {timesteps} timesteps take "
            f"{needed / 2**20:.0f} MiB, more than the {found.nbytes / 2**20:.0f} MiB of weights that they replace; "
            "give fewer classes, or leave it out"
        )
    part = take_out(model, found, run_input, images, half=half, expanded=False)
    return ClassTables(part, name, tuple(classes))
