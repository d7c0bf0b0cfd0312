"""The schedules that are replayed, for every model: published and shipped patterns, rules, random gates, samplers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import CacheKind, Granularity
from dipgo_deploy.models.location import BUILT_IN, config_folder, denoiser_config
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.schedule import builders
from dipgo_deploy.schedule.builders import Target
from dipgo_deploy.schedule.document import Gates, Schedule

STEPS = 6
_EPSILON_SAMPLERS = ("ddim", "pndm", "heun", "dpm++2m", "euler-a")
_FLOW_SAMPLERS = ("flow-euler", "flow-heun", "flow-unipc")


@dataclass(frozen=True)
class Case:
    """One schedule, or why there is none, with what the export of it is told besides; only ``variants`` knows
    ``max_variants``."""

    name: str
    schedule: Schedule | UserError
    max_variants: int | None = None
    strength: float | None = None


@dataclass(frozen=True)
class Units:
    """What needs a trace of its own."""

    granularity: Granularity
    cache: CacheKind | None


def units_of(model: str) -> list[Units]:
    """Every granularity with every kind of cache that all of its blocks can have."""
    family, config = denoiser_config(config_folder(model))
    found = []
    for granularity in family.granularities:
        kinds = set.intersection(*(set(spec.caches) for spec in family.blocks(config, granularity)))
        found += [Units(granularity, kind) for kind in sorted(kinds)] or [Units(granularity, None)]
    return found


def cases_of(model: str, units: Units) -> Iterator[Case]:
    """All cases of a model for one trace, the first a full run."""
    family, _ = denoiser_config(config_folder(model))
    samplers = _FLOW_SAMPLERS if family.kind == "flow" else _EPSILON_SAMPLERS
    own = schedule_target(model, None, STEPS, units.granularity, units.cache)
    yield Case("full", _schedule(own, builders.full(own.steps, len(own.blocks))))
    for name, gates in _gates(own):
        yield Case(name, _schedule(own, gates))
    busy = _schedule(own, _random(own, 0.5, 3))
    yield Case("at-most-2-variants", busy, max_variants=2)
    if family.image_to_image is not None:
        yield Case("strength-0.6", busy, strength=0.6)
    for sampler in samplers[1:]:
        name = f"random-0.5-{sampler}"
        try:
            target = schedule_target(model, sampler, STEPS, units.granularity, units.cache)
        except UserError as error:
            yield Case(name, error)
        else:
            yield Case(name, _schedule(target, _random(target, 0.5, 4)))
    if model in BUILT_IN:
        yield from _shipped(model, own)


def _gates(target: Target) -> Iterator[tuple[str, Gates]]:
    steps, names = target.steps, target.block_names
    count = len(names)
    for interval in (2, 3):
        yield f"uniform-{interval}", builders.uniform(steps, count, interval)
    for seed, ratio in enumerate((0.3, 0.5, 0.8)):
        yield f"random-{ratio}", _random(target, ratio, seed)
    yield "checkerboard", _rule(steps, count, lambda step, block: (step + block) % 2 == 0)
    yield "outer-half", _rule(steps, count, lambda step, block: abs(2 * block + 1 - count) > count // 2)
    yield "first-step-only", _rule(steps, count, lambda step, block: False)
    if any(name.startswith("up_blocks") for name in names):
        yield "deepcache-3-0", builders.deepcache(steps, names, 3, 0)


def _rule(steps: int, count: int, keep: object) -> Gates:
    assert callable(keep)
    return tuple(tuple(step == 0 or bool(keep(step, block)) for block in range(count)) for step in range(steps))


def _random(target: Target, ratio: float, seed: int) -> Gates:
    return builders.random(target.steps, len(target.blocks), ratio, seed)


def _schedule(target: Target, gates: Gates) -> Schedule:
    return target.schedule(gates, "replay", {})


def _shipped(model: str, target: Target) -> Iterator[Case]:
    for file in sorted((Path(config_folder(model)).parent / "schedules").glob("*.json")):
        schedule = Schedule.load(file)
        if schedule.blocks == target.blocks and schedule.model == target.model:
            yield Case(file.stem, schedule)
