"""What all importers share: what one is, what it is given, and how what it reads becomes a schedule."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.files import read_bytes
from dipgo_deploy.schedule import validation

if TYPE_CHECKING:
    from dipgo_deploy.schedule.builders import PendingTarget, Target
    from dipgo_deploy.schedule.document import Gates, Schedule
    from dipgo_deploy.schedule.forecast import Forecast
    from dipgo_deploy.schedule.importers.settings import Settings
    from dipgo_deploy.schedule.kinds import CacheKind, Granularity


class Source:
    """What a reader may ask of the model and the sampler. The sampler is made when it is first asked for, which takes
    seconds: what a file alone can have wrong is looked at before.

    Attributes:
        names: the model's N blocks in order of execution.
        most: a file with more rows than this is refused before they are read.
    """

    def __init__(self, target: Target | PendingTarget) -> None:
        self._given = target
        self.names: tuple[str, ...] = target.block_names
        self.most: int = target.most_steps

    @cached_property
    def target(self) -> Target:
        """The model, its blocks and the sampler."""
        return self._given.complete()

    @property
    def steps(self) -> int:
        """T, the sampler's evaluations of the denoiser."""
        return self.target.steps


@dataclass(frozen=True)
class Predictions:
    """Between launches of the whole denoiser, its prediction is a weighted sum of launched ones.

    Attributes:
        launched: the evaluations that launch it, rising from 0.
        weights: for each of the T evaluations the weights of the launched predictions, the first launch first.
        sigmas: where it is the denoised latent x - sigma v that is such a sum: T noise levels. None: the prediction.
    """

    launched: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    sigmas: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Imported:
    """What a file says.

    Attributes:
        gates: T x N; with ``predictions``, of no account.
        forecast: what skipped blocks read; None: what they stored last.
        predictions: what stands in for predictions that are not launched; None: blocks are skipped, not predictions.
        settings: what the provenance says besides the file.
        notes: one line each, for a reader: what was read, and what the schedule does not do that the method does.
    """

    gates: Gates = ()
    forecast: Forecast | None = None
    predictions: Predictions | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """What a kind of file leaves open, an option of its command.

    Attributes:
        name: of the reader's argument; the option has dashes.
        type: ``int``, ``float`` or ``str``.
        help: for people.
        default: None: the reader finds out.
        default_text: what the help says where the default is None.
        least, most: bounds that are not allowed themselves.
        choices: of a ``str``.
    """

    name: str
    type: type
    help: str
    default: Any = None
    default_text: str = "told by the file"
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()

    def check(self, value: Any) -> None:
        """Refuse (UserError) a value that is out of bounds."""
        if self.choices and value is not None and value not in self.choices:
            raise UserError(f"{self.name}: {value!r} is not {' or '.join(self.choices)}")
        low, high = self.least, self.most
        if low is not None and high is not None and value is not None and not low < value < high:
            raise UserError(f"{self.name}: {value:g} is not between {low:g} and {high:g}")


@dataclass(frozen=True)
class Importer:
    """A reader of one kind of file.

    Attributes:
        kind: its name on the command line.
        title: one sentence on what it reads.
        file: what FILE is, for the help.
        read(data, source, settings by name): what the bytes say. Pure but for ``source``; executes nothing in them;
            raises UserError without the file's name.
        granularity: of the blocks that such files are about.
        cache: the kind of cache that the method has; None: any.
        settings: options of its command.
        example: options of an example, with the file's name in front.
        write(schedule): the text of such a file, where nothing is lost (UserError where something would be).
    """

    kind: str
    title: str
    file: str
    read: Callable[..., Imported]
    example: str
    granularity: Granularity = "block"
    cache: CacheKind | None = None
    settings: tuple[Setting, ...] = ()
    write: Callable[[Schedule], str] | None = None


def import_with(
    importer: Importer, path: str | Path, target: Target | PendingTarget, **settings: Any
) -> tuple[Schedule, tuple[str, ...]]:
    """The schedule that a file (at most 16 MiB) makes for ``target``, and lines for people.

    A schedule exactly one row short of the sampler's evaluations (one made per step for PNDM, which evaluates its
    first step twice) has its last row repeated. The provenance names the file, its SHA-256, the settings and the
    repeated row. Raises UserError with the file's name in front.
    """
    given = {setting.name: settings.pop(setting.name, setting.default) for setting in importer.settings}
    if settings:
        raise UserError(f"{importer.kind}: has no setting {next(iter(settings))!r}")
    for setting in importer.settings:
        setting.check(given[setting.name])
    data = read_bytes(path)
    parameters: dict[str, Any] = {"file": Path(path).name, "sha256": hashlib.sha256(data).hexdigest()}
    parameters |= {name: value for name, value in given.items() if value is not None}
    source = Source(target)
    try:
        imported = importer.read(data, source, **given)
        target = source.target
        if importer.cache is not None and (
            other := next((b for b in target.blocks if b.cache != importer.cache), None)
        ):
            raise UserError(
                f"{importer.kind}: is about the last {importer.cache} of a block, and {other.name} has a cache of kind "
                f"{other.cache!r}; give --cache {importer.cache}, or a model that has it"
            )
        return _schedule(importer, imported, target, parameters), imported.notes
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _schedule(importer: Importer, imported: Imported, target: Target, parameters: dict[str, Any]) -> Schedule:
    parameters |= imported.settings
    method = f"import {importer.kind}"
    if imported.predictions is not None:
        given = imported.predictions
        whole = target.schedule(((True,) * len(target.blocks),) * target.steps, method, parameters)
        solver = target.extrapolated(given.launched, given.weights, {"method": method}, given.sigmas)
        return whole.with_solver(solver, ((True,) * len(target.blocks),) * len(given.launched))
    gates = imported.gates
    if len(gates) == target.steps - 1 and gates:
        parameters["last_row_repeated"] = 1
        gates = (*gates, gates[-1])
    sampler = target.sampler
    validation.check_steps(len(gates), target.steps, sampler.class_name, sampler.num_inference_steps)
    schedule = target.schedule(gates, method, parameters)
    return schedule if imported.forecast is None else schedule.with_forecast(imported.forecast)


def of_rows(read: Callable[[bytes, tuple[str, ...], int], Gates]) -> Callable[..., Imported]:
    """The reader of a file that has gates and nothing else. read(data, block names, most rows) -> T x N gates."""
    return lambda data, source: Imported(read(data, source.names, source.most))


def check_only_gates(schedule: Schedule, cache: CacheKind) -> None:
    """Refuse (UserError) to write a schedule of which a format that has gates, and caches of one kind, loses
    something."""
    if schedule.forecast is not None or schedule.solver is not None:
        raise UserError("has a forecast or a solver, which this format does not say; leave it out")
    if schedule.denoisers is not None:
        raise UserError("is of several denoisers, and this format knows one")
    if schedule.guidance is not None:
        raise UserError("has a guidance of its own at each evaluation, which this format does not say; leave it out")
    other = next((block for block in schedule.blocks if block.cache != cache), None)
    if other is not None:
        raise UserError(f"{other.name} has a cache of kind {other.cache!r}, and this format is about {cache}s")


def check_rows(rows: int, most: int) -> None:
    """Refuse (UserError) more than ``most`` rows before they are read one by one."""
    if rows > most:
        raise UserError(f"steps: {rows:,} rows or more, but the sampler evaluates the denoiser fewer times")


def whole_steps(computed: Sequence[bool], blocks: int) -> Gates:
    """Gates of schedules that run an evaluation whole or not at all."""
    return tuple((kept,) * blocks for kept in computed)


def kept_until_stored(gates: Gates) -> tuple[Gates, int]:
    """The gates of a method that computes what has no value yet, whatever its file says, and how many those are."""
    stored = [False] * (len(gates[0]) if gates else 0)
    rows, early = [], 0
    for row in gates:
        early += sum(not kept and not known for kept, known in zip(row, stored, strict=True))
        rows.append(tuple(kept or not known for kept, known in zip(row, stored, strict=True)))
        stored = [True] * len(stored)
    return tuple(rows), early


def check_steps_of(settings: Settings, name: str, source: Source) -> None:
    """Refuse (UserError) settings that are for another number of steps, where they say one."""
    if name not in settings:
        settings.ignore(name)
        return
    steps = settings.integer(name, least=1)
    sampler = source.target.sampler
    if steps != sampler.num_inference_steps:
        raise UserError(f"{name}: made for {steps} steps, not for {sampler.num_inference_steps}; give --steps {steps}")


def flow_sigmas(target: Target) -> tuple[float, ...]:
    """The T + 1 noise levels of Euler's method for flow matching. Raises UserError for another sampler."""
    sampler = target.sampler
    if sampler.class_name != "FlowMatchEulerDiscreteScheduler" or sampler.config.get("stochastic_sampling"):
        raise UserError(
            f"{sampler.class_name}: this method is one of Euler's steps in flow matching; give --sampler flow-euler"
        )
    scale = float(sampler.config.get("num_train_timesteps", 1000))
    return (*(timestep / scale for timestep in target.timesteps), 0.0)
