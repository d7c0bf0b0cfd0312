"""What becomes of each block at each evaluation: read off the schedule, the launch list and the graphs' weights.

Pure functions, but for ``weights_by_variant``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dipgo_deploy.bundle.manifest import LaunchEntry, Manifest, PlanEntry
from dipgo_deploy.bundle.names import is_weighted, parse_cache
from dipgo_deploy.bundle.stored import StoredValue, stored_values, values_read
from dipgo_deploy.bundle.weights import WEIGHTS_INDEX, StoredWeight, WeightsIndex, weights_of
from dipgo_deploy.engine.budget import size
from dipgo_deploy.schedule.document import Gates

COMPUTED, REUSED, FORECAST, DEAD, NO_LAUNCH, OTHER = range(6)
STATES = (
    "computed",
    "reused: what it gave before is read",
    "forecast: a weighted sum of what it gave before is read",
    "dead: nothing reads it at this evaluation",
    "no launch",
    "another denoiser runs",
)
NAMES = ("computed", "reused", "forecast", "dead", "no launch", "another denoiser")
# Of its weights a graph holds nearly all of a block that it computes, and next to none of another: equal weights of two
# blocks are stored once.
_MOST = 0.5

Weights = Mapping[str, StoredWeight]


@dataclass(frozen=True)
class Column:
    """One evaluation.

    Attributes:
        timestep: of its launches; None where there are none.
        graphs: names of what is launched, in order.
        macs: multiply-accumulates of its launches.
        denoiser: which one runs, of a model with several; else empty.
        guidance: how much of the run's guidance it has; 0 is conditional only.
    """

    step: int
    timestep: float | None
    graphs: tuple[str, ...]
    macs: int
    denoiser: str = ""
    guidance: float = 1.0


@dataclass(frozen=True)
class Cells:
    """A schedule as it is run.

    Attributes:
        blocks: N names.
        columns: T evaluations.
        states: N x T of ``COMPUTED`` and so on.
        notes: of (block, evaluation), lines on its buffers and on why.
        weights_known: whether the graphs' weights are; without them a block that is dead counts as computed.
    """

    blocks: tuple[str, ...]
    columns: tuple[Column, ...]
    states: tuple[tuple[int, ...], ...]
    notes: Mapping[tuple[int, int], tuple[str, ...]]
    weights_known: bool

    def count(self, state: int) -> int:
        """Cells in a state."""
        return sum(row.count(state) for row in self.states)


def weights_by_variant(engine_dir: Path, plan: PlanEntry) -> tuple[Weights, ...] | None:
    """The weights that each variant's graph takes; None where the directory is older than the index of weights.

    Raises:
        UserError: a graph or the index cannot be read.
    """
    paths = [engine_dir / variant.graph.file for variant in plan.variants]
    folders = {path.parent for path in paths}
    if not all((folder / WEIGHTS_INDEX).is_file() for folder in folders):
        return None
    indices = {folder: WeightsIndex.load(folder) for folder in folders}
    return tuple(weights_of(path, indices[path.parent]) for path in paths)


def cells_of(
    manifest: Manifest, blocks: Sequence[str], gates: Gates, runs: Gates, weights: Sequence[Weights] | None
) -> Cells:
    """What becomes of each block.

    Args:
        blocks: N names.
        gates: T x N, of the evaluations that are run.
        runs: T x N, whether the block's denoiser runs.
        weights: of each variant, see ``weights_by_variant``.
    """
    plan = manifest.plan
    columns = tuple(_columns(manifest))
    computed = None if weights is None else _computed(plan, blocks, weights)
    again = {(step, block) for step, block in manifest.promoted}
    begin = manifest.sampler.begin or 0
    places = {name: place for place, name in enumerate(blocks)}
    notes: dict[tuple[int, int], list[str]] = {}
    read: dict[tuple[int, int], int] = {}
    values = stored_values(plan)
    for launch, read_places in zip(plan.launches, values_read(plan), strict=True):
        for at, weight in zip(read_places, _weights(plan, launch), strict=True):
            if weight == 0:
                continue
            value = values[at]
            place = _block_of(value, places)
            written = plan.launches[value.written].step
            if place is None or (written == launch.step and weight is None):
                continue
            key = (place, launch.step)
            how = "reads" if weight is None else f"reads {weight:.4g} times"
            notes.setdefault(key, []).append(f"{how} {_buffer(value)}, written at evaluation {written}")
            read[key] = max(read.get(key, REUSED), REUSED if weight is None else FORECAST)
    for value in values:
        place = _block_of(value, places)
        if place is not None:
            steps = sorted({plan.launches[number].step for number in value.read})
            until = f"last read at evaluation {steps[-1]}" if steps else "never read"
            key = (place, plan.launches[value.written].step)
            notes.setdefault(key, []).append(f"writes {_buffer(value)}, {until}")
    states = []
    for place, name in enumerate(blocks):
        row = []
        for column in columns:
            key = (place, column.step)
            kept = gates[column.step][place]
            if not runs[column.step][place]:
                row.append(OTHER)
            elif not column.graphs:
                row.append(NO_LAUNCH)
            elif kept and (computed is None or (column.step, place) in computed):
                row.append(COMPUTED)
                if (begin + column.step, name) in again:
                    notes.setdefault(key, []).append("re-enabled: the schedule skips it")
            else:
                row.append(DEAD if kept else read.get(key, DEAD))
                if kept:
                    notes.setdefault(key, []).append("the schedule keeps it, and nothing needs what it would give")
        states.append(tuple(row))
    return Cells(
        tuple(blocks), columns, tuple(states), {key: tuple(found) for key, found in notes.items()}, computed is not None
    )


def _columns(manifest: Manifest) -> list[Column]:
    plan = manifest.plan
    found = []
    for step in range(plan.evaluations):
        launches = [launch for launch in plan.launches if launch.step == step]
        variants = [plan.variants[launch.variant] for launch in launches]
        names = manifest.model.denoisers
        found.append(
            Column(
                step,
                launches[0].timestep if launches else None,
                tuple(dict.fromkeys(variant.name for variant in variants)),
                sum(variant.macs for variant in variants),
                names[launches[0].denoiser] if launches and names else "",
                launches[0].guidance if launches else 1.0,
            )
        )
    return found


def _computed(plan: PlanEntry, blocks: Sequence[str], weights: Sequence[Weights]) -> set[tuple[int, int]]:
    """(evaluation, block) of what the launched graphs compute: those that hold the block's weights. A block without
    weights counts as computed everywhere."""
    every = {name: stored for graph in weights for name, stored in graph.items()}
    own = [{name: stored.length for name, stored in every.items() if _is_of(stored, block)} for block in blocks]
    found = set()
    for step in range(plan.evaluations):
        held = {name for launch in plan.launches if launch.step == step for name in weights[launch.variant]}
        for place, tensors in enumerate(own):
            here = sum(length for name, length in tensors.items() if name in held)
            if here >= _MOST * sum(tensors.values()):
                found.add((step, place))
    return found


def _is_of(stored: StoredWeight, block: str) -> bool:
    names = (*(() if stored.parameter is None else (stored.parameter,)), *stored.equal)
    return any(name.startswith(f"{block}.") for name in names)


def _weights(plan: PlanEntry, launch: LaunchEntry) -> list[float | None]:
    """The weight of each of a launch's reads; None for what is read as it is."""
    names = plan.variants[launch.variant].reads
    if not launch.forecast:
        return [None] * len(names)
    marked = any(map(is_weighted, names))
    weights = iter(launch.forecast)
    return [next(weights) if is_weighted(name) or not marked else None for name in names]


def _block_of(value: StoredValue, places: Mapping[str, int]) -> int | None:
    cache = parse_cache(value.name)
    return None if cache is None else places.get(cache.block)


def _buffer(value: StoredValue) -> str:
    return f"{value.name} ({size(value.spec.nbytes)} at byte {value.offset})"
