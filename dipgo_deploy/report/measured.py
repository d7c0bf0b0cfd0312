"""What ``dipgo-bench`` and ``dipgo-compare`` wrote as JSON, read for a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic

from dipgo_deploy.bundle.manifest import PlanEntry
from dipgo_deploy.documents import read_document
from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.validation import one_line

_KINDS = "`dipgo-bench profile -o`, `dipgo-bench quality -o` or `dipgo-compare --json`"
_LIMIT = 64 * 2**20
Number = Annotated[float, pydantic.Field(allow_inf_nan=False)]


class _Read(pydantic.BaseModel):
    """Fields that a report does not show are passed over."""

    model_config = pydantic.ConfigDict(frozen=True, extra="ignore")


class TimedLaunch(_Read):
    """One launch of a profile."""

    step: int
    variant: str
    seconds: Number


class Profile(_Read):
    """``dipgo-bench profile -o``: seconds of one run, the means of several."""

    engine_dir: str
    loop_seconds: Number
    host_seconds: Number
    launches: tuple[TimedLaunch, ...] = pydantic.Field(min_length=1)
    kernel_seconds: Number
    copy_seconds: Number
    blocks: dict[str, Number]
    operators: dict[str, Number]

    def fits(self, plan: PlanEntry) -> bool:
        """Whether it is of these launches."""
        names = [(launch.step, plan.variants[launch.variant].name) for launch in plan.launches]
        return names == [(launch.step, launch.variant) for launch in self.launches]


class Spread(_Read):
    """Seconds of several rounds."""

    median: Number


class LimitedGraph(_Read):
    """A graph beside what the machine can do: the seconds that its multiply-accumulates or its bytes take at least."""

    name: str
    launches: int
    least_seconds: Number
    seconds: dict[str, Spread]


class Ceiling(_Read):
    """What the machine can do."""

    macs_per_second: Number
    bytes_per_second: Number


class Limit(_Read):
    """``python -m tools.bench.limit --json``: graphs, run alone, beside the machine's own limit."""

    ceiling: Ceiling
    graphs: tuple[LimitedGraph, ...] = pydantic.Field(min_length=1)

    def fits(self, plan: PlanEntry) -> bool:
        """Whether it is of these graphs."""
        counts = dict.fromkeys((variant.name for variant in plan.variants), 0)
        for launch in plan.launches:
            counts[plan.variants[launch.variant].name] += 1
        return list(counts.items()) == [(graph.name, graph.launches) for graph in self.graphs]


class Interval(_Read):
    """A value with its 95% interval; infinite where pictures are equal to the bit."""

    value: float
    low: float
    high: float


class Case(_Read):
    """A row of ``dipgo-bench quality``: costs, and how close its pictures are to the full run's."""

    name: str
    baseline: bool = False
    launches: int
    macs: Number
    milliseconds: Number
    ssim: Interval
    psnr: Interval | None = None
    against: str | None = None
    difference: Interval | None = None
    accuracy: Interval | None = None
    frechet: Interval | None = None
    guidance_scale: Number | None = None


class Reference(_Read):
    """The full run that pictures are compared with."""

    sampler: str
    steps: int


class Quality(_Read):
    """``dipgo-bench quality``: cases beside the full run."""

    model: str
    reference: Reference
    images: int
    cases: tuple[Case, ...] = pydantic.Field(min_length=1)


class Compared(_Read):
    """One tensor of ``dipgo-compare``."""

    name: str
    relative: Annotated[float, pydantic.BeforeValidator(lambda value: math.inf if value is None else value)]
    made: Number | None = None
    carried: Number | None = None


class ComparedStep(_Read):
    """One evaluation of ``dipgo-compare``."""

    step: int
    variant: str | None
    tensors: tuple[Compared, ...]


class ComparedWith(_Read):
    """The tolerance of a comparison."""

    relative: Number


class Comparison(_Read):
    """``dipgo-compare --json``: the error at each evaluation."""

    passed: bool
    reference: str
    first_failure: str | None = None
    tolerance: ComparedWith
    loop: tuple[ComparedStep, ...]
    skipped: tuple[str, ...] = ()


Measured = Profile | Limit | Quality | Comparison


def read_measured(path: Path) -> Measured:
    """One file.

    Raises:
        UserError: it cannot be read, or is none of these.
    """
    data = read_document(path, "measurement", f"give what {_KINDS} wrote", limit=_LIMIT, infinite=True)
    kind = _kind(data)
    if kind is None:
        raise UserError(f"{path}: is no measurement; give what {_KINDS} wrote")
    try:
        return kind.model_validate(data)
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: {one_line(error)}; measure it again") from None


def _kind(data: Mapping[str, Any]) -> type[Profile] | type[Limit] | type[Quality] | type[Comparison] | None:
    if "loop_seconds" in data:
        return Profile
    if "ceiling" in data:
        return Limit
    if "cases" in data:
        return Quality
    return Comparison if "loop" in data and "tolerance" in data else None


def sides(
    profiles: Sequence[tuple[Path, Profile]], ours: tuple[Path, PlanEntry], theirs: tuple[Path, PlanEntry] | None
) -> tuple[Profile | None, Profile | None]:
    """Which profile is of which directory, by its launches, and by the directory's path where both have the same.

    Raises:
        UserError: a profile of neither, or two of one.
    """
    found: dict[Path, Profile] = {}
    for path, profile in profiles:
        fitting = [folder for folder, plan in (ours, *(() if theirs is None else (theirs,))) if profile.fits(plan)]
        named = [folder for folder in fitting if folder.resolve() == Path(profile.engine_dir).resolve()]
        if not fitting:
            raise UserError(f"{path}: its launches are not those of {ours[0]}; measure that, or leave the file out")
        folder = (named or fitting)[0]
        if folder in found:
            raise UserError(f"{path}: a second profile of {folder}; give one")
        found[folder] = profile
    return found.get(ours[0]), None if theirs is None else found.get(theirs[0])
