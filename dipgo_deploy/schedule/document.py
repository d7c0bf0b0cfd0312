"""The schedule: which blocks of a denoiser run at which evaluation. An immutable, versioned document."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Protocol

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    model_validator,
)

from dipgo_deploy import arguments
from dipgo_deploy.documents import json_object
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import read_bytes, write_atomic
from dipgo_deploy.schedule import validation
from dipgo_deploy.schedule.built_in import schedule_file
from dipgo_deploy.schedule.forecast import AnyForecast, Forecast
from dipgo_deploy.schedule.frozen import freeze, freeze_config, to_json
from dipgo_deploy.schedule.kinds import CacheKind, Granularity
from dipgo_deploy.schedule.solver import FrozenJson, Solver

# 2: with a solver. 3: with a forecast. 4: with denoisers. 5: with guidance.
FORMAT_VERSION = 5

Gates = tuple[tuple[bool, ...], ...]
Name = Annotated[StrictStr, Field(min_length=1)]
Positive = Annotated[StrictInt, Field(ge=1)]
GuidanceShare = Annotated[float, Field(strict=True, ge=0, le=validation.MAX_GUIDANCE, allow_inf_nan=False)]
# Frozen before (plain Python in, JSON-like data checked) and after (pydantic makes a plain dictionary of it).
FrozenConfig = Annotated[dict[str, Any], BeforeValidator(freeze_config), AfterValidator(freeze)]
# A list of numbers, which `json.dumps` writes one a line; and one of such lists.
_NUMBERS = re.compile(r"\[[-+.,\deE\s]+\]")
_LISTS = re.compile(r"\[(?:\s*\[[-+.,\deE\s]*\],?\s*)+\]")
Row = Annotated[StrictStr, WithJsonSchema({"type": "string", "pattern": "^[01]+$"})]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelIdentity(_Part):
    """The model a schedule was made for: diffusers class, hash of its configuration, size of the units."""

    class_name: Name
    config_hash: Annotated[StrictStr, Field(pattern="^[0-9a-f]{64}$")]
    granularity: Granularity


class BlockEntry(_Part):
    """One block: its module's dotted path and what is cached of it."""

    name: Name
    cache: CacheKind


class SamplerEntry(_Part):
    """The diffusers scheduler, its configuration and the number of steps the schedule was made for."""

    class_name: Name
    config: FrozenConfig
    num_inference_steps: Positive


def _is_none(value: object) -> bool:
    return value is None


@dataclass(frozen=True)
class GateChange:
    """A gate that differs: evaluation index, block name, value before and after."""

    step: int
    block: str
    before: bool
    after: bool


@dataclass(frozen=True)
class ScheduleDiff:
    """What differs between two schedules.

    fields: dotted name -> (before, after) of everything but the gates. gates: the gates that differ, by evaluation and
    then block, over the evaluations and blocks that both schedules have. Falsy when nothing differs.
    """

    fields: Mapping[str, tuple[Any, Any]]
    gates: tuple[GateChange, ...]

    def __bool__(self) -> bool:
        return bool(self.fields or self.gates)


class MadeFor(Protocol):
    """What a schedule is made for (``builders.Target``)."""

    @property
    def block_names(self) -> tuple[str, ...]:
        """In order of execution."""

    @property
    def sampler(self) -> SamplerEntry:
        """With its number of steps."""

    @property
    def steps(self) -> int:
        """Evaluations of the denoiser."""

    def schedule(self, gates: Gates, method: str, parameters: Mapping[str, Any]) -> Schedule:
        """The document for these gates."""


class Schedule(_Part):
    """Which blocks run at which evaluation of the denoiser, for one model and one sampler.

    Attributes:
        blocks: N blocks in order of execution.
        steps: T, the number of EVALUATIONS of the denoiser (PNDM evaluates more often than it steps).
        keep: T strings of N characters, ``1`` = the block is computed, ``0`` = its cache is read, or the evaluation
            runs another denoiser.
        denoisers: T names: the denoiser that makes the prediction of each evaluation; a block's name begins with that
            of its own. None: the model has one.
        guidance: T numbers: how much of the run's guidance each evaluation has. The scale is ``off + share * (scale -
            off)``, where ``off`` is the one that does nothing (1). 0: it is conditional only, with half the batch; what
            blocks store then has no unconditional half. None: all have all of it.
        solver: the fitted solver that is run in place of ``sampler``; T is then its number of evaluations.
        forecast: what removed blocks read; None: the value that they stored last.
        provenance: how it was made (``method``, ``parameters``, ``tool_version``).

    Whatever is wrong with a document raises UserError with one line that names field, evaluation and block.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", title="dipgo_deploy schedule")

    format_version: Literal[1, 2, 3, 4, 5] = 1
    model: ModelIdentity
    blocks: tuple[BlockEntry, ...]
    steps: Positive
    keep: tuple[Row, ...]
    denoisers: tuple[Name, ...] | None = Field(default=None, exclude_if=_is_none)
    guidance: tuple[GuidanceShare, ...] | None = Field(default=None, exclude_if=_is_none)
    sampler: SamplerEntry
    solver: Solver | None = Field(default=None, exclude_if=_is_none)
    forecast: AnyForecast | None = Field(default=None, exclude_if=_is_none)
    provenance: FrozenJson = Field(default_factory=dict, validate_default=True)

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, data: Any, handler: ValidatorFunctionWrapHandler) -> Schedule:
        # Raised here, a UserError passes through pydantic unchanged: every way to make a Schedule says one line.
        version = data.get("format_version", 1) if isinstance(data, Mapping) else 1
        if type(version) is not int or version not in range(1, FORMAT_VERSION + 1):  # True is 1
            raise UserError(
                f"format_version: {repr(version)[:60]} is not known, only 1 to {FORMAT_VERSION}; "
                f"use the version of dipgo-deploy that wrote it"
            )
        if isinstance(data, Mapping):
            validation.check_sizes(data)
        try:
            schedule: Schedule = handler(data)
        except ValidationError as error:
            raise UserError(validation.one_line(error)) from error
        names = schedule.block_names
        validation.check_names(names)
        validation.check_rows(schedule.keep, names, schedule.steps)
        if schedule.denoisers is not None:
            if schedule.format_version < 4:
                raise UserError(f"format_version: {schedule.format_version} has no denoisers; give 4")
            validation.check_denoisers(schedule.denoisers, names, schedule.gates)
            for name in ("solver", "forecast"):
                if getattr(schedule, name) is not None:
                    raise UserError(f"{name}: not for a model of several denoisers; leave it out")
        validation.check_caches_written(schedule.gates, names, schedule.runs)
        if schedule.guidance is not None:
            if schedule.format_version < 5:
                raise UserError(f"format_version: {schedule.format_version} has no guidance; give 5")
            validation.check_guidance(schedule.guidance, schedule.steps)
            validation.check_halves(schedule.gates, names, schedule.runs, schedule.conditional_only)
        if schedule.solver is not None:
            if schedule.format_version == 1:
                raise UserError("format_version: 1 has no solver; give 2")
            schedule.solver.check(schedule.steps)
        if schedule.forecast is not None:
            if schedule.format_version < 3:
                raise UserError(f"format_version: {schedule.format_version} has no forecast; give 3")
            schedule.forecast.check(schedule.gates, names, schedule.conditional_only)
        return schedule

    @property
    def block_names(self) -> tuple[str, ...]:
        """The blocks' names in order of execution."""
        return tuple(block.name for block in self.blocks)

    @property
    def cache_kinds(self) -> dict[str, CacheKind]:
        """Block name -> cache kind."""
        return {block.name: block.cache for block in self.blocks}

    @cached_property
    def gates(self) -> Gates:
        """T x N booleans, True where the block is computed."""
        return tuple(tuple(cell == "1" for cell in row) for row in self.keep)

    @cached_property
    def runs(self) -> Gates:
        """T x N booleans, True where the evaluation runs the denoiser that the block is of."""
        names = self.block_names
        if self.denoisers is None:
            return ((True,) * len(names),) * self.steps
        return tuple(tuple(denoiser_of(name) == denoiser for name in names) for denoiser in self.denoisers)

    @cached_property
    def conditional_only(self) -> tuple[bool, ...]:
        """T booleans, True where the evaluation has no unconditional half."""
        return (False,) * self.steps if self.guidance is None else tuple(share == 0 for share in self.guidance)

    @property
    def forecast_line(self) -> str | None:
        """What removed blocks read, in a line; None without a forecast."""
        return None if self.forecast is None else self.forecast.summary(self.gates, self.conditional_only)

    @property
    def kept_share(self) -> float:
        """Share of the gates of the denoisers that are run that are computed, 0 to 1."""
        return sum(row.count("1") for row in self.keep) / sum(map(sum, self.runs))

    def with_gates(self, gates: Sequence[Sequence[bool]], provenance: Mapping[str, Any] | None = None) -> Schedule:
        """The same document with other gates (T x N), and with other provenance when it is given."""
        changes: dict[str, Any] = {"keep": gate_rows(gates)}
        if provenance is not None:
            changes["provenance"] = provenance
        return Schedule.model_validate({**{name: getattr(self, name) for name in Schedule.model_fields}, **changes})

    def check_model(
        self,
        class_name: str,
        config_hash: str | Sequence[str],
        caches: Mapping[str, Sequence[str]],
        *,
        denoisers: Sequence[str] = ("",),
        allow_other_config: bool = False,
    ) -> None:
        """Refuse (UserError) a model that this schedule was not made for.

        Args:
            denoisers: its names for those that take turns; one has none.
            config_hash: the hash of its configuration, or all that are accepted for it, the one that is recorded
                first.
            caches: block name -> cache kinds it supports, in order of execution, at this schedule's granularity.
            allow_other_config: accept another configuration of the same class, as long as the blocks are the same.
        """
        if class_name != self.model.class_name:
            raise UserError(f"model.class_name: made for {self.model.class_name}, this model is {class_name}")
        validation.check_block_names(self.block_names, tuple(caches))
        validation.check_denoisers_known(self.denoisers, denoisers)
        validation.check_cache_kinds(self.cache_kinds, caches)
        hashes = (config_hash,) if isinstance(config_hash, str) else config_hash
        validation.check_config_hash(self.model.config_hash, hashes, allow_other=allow_other_config)

    def check_evaluations(self, evaluations: int) -> None:
        """Refuse (UserError) a number of rows that is not the sampler's number of evaluations; a fitted solver's is
        checked with the document."""
        if self.solver is not None:
            return
        sampler = self.sampler
        validation.check_steps(self.steps, evaluations, sampler.class_name, sampler.num_inference_steps)

    def diff(self, other: Schedule) -> ScheduleDiff:
        """What differs from this schedule to ``other``."""
        arguments.instance("other", other, Schedule, "a Schedule")
        before, after = _leaves(self), _leaves(other)
        fields = {
            name: (before.get(name), after.get(name))
            for name in dict.fromkeys((*before, *after))
            if before.get(name) != after.get(name)
        }
        columns = {name: column for column, name in enumerate(other.block_names)}
        gates = tuple(
            GateChange(step, name, row[column], other.gates[step][columns[name]])
            for step, row in enumerate(self.gates[: other.steps])
            for column, name in enumerate(self.block_names)
            if name in columns and row[column] != other.gates[step][columns[name]]
        )
        return ScheduleDiff(fields, gates)

    def to_json(self) -> str:
        """The document as JSON text: one line a block and one line an evaluation."""
        document = to_json(self.model_dump())
        parts = []
        for name, value in document.items():
            if isinstance(value, list):
                items = ",\n".join(f"    {json.dumps(item)}" for item in value)
                text = f"[\n{items}\n  ]"
            else:
                text = json.dumps(value, indent=2, allow_nan=False).replace("\n", "\n  ")
            if name in ("solver", "forecast"):
                text = _NUMBERS.sub(lambda match: " ".join(match[0].split()), text)
            if name == "forecast":
                text = _LISTS.sub(lambda match: " ".join(match[0].split()), text)
            parts.append(f"  {json.dumps(name)}: {text}")
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def with_solver(
        self,
        solver: Solver | None,
        gates: Sequence[Sequence[bool]] | None = None,
        guidance: Sequence[float] | None = None,
    ) -> Schedule:
        """The same document with this solver in place of its sampler, or with none; gates and guidance: of its
        evaluations, the same where gates are None. A forecast goes with the gates that it was made for (see
        ``with_forecast``)."""
        changes: dict[str, Any] = {"solver": solver}
        if gates is not None:
            changes |= {"steps": len(gates), "keep": gate_rows(gates), "guidance": guidance_row(guidance)}
        if gates is not None and gate_rows(gates) != self.keep:
            changes["forecast"] = None
        return self._with(changes)

    def with_guidance(self, guidance: Sequence[float] | None) -> Schedule:
        """The same document with this guidance, one number an evaluation; all guided where None or all 1.

        Raises:
            UserError: as for a document, also a removed block at a guided evaluation that was last computed at a
                conditional-only one.
        """
        return self._with({"guidance": guidance_row(guidance)})

    def with_forecast(self, forecast: Forecast | None) -> Schedule:
        """The same document with this forecast, or with none."""
        return self._with({"forecast": forecast})

    def at(self, steps: Sequence[int]) -> Schedule:
        """The document of these evaluations alone, in their order; without a solver, whose rows would be too many."""
        forecast = None if self.forecast is None else self.forecast.at(steps)
        rows = tuple(self.keep[step] for step in steps)
        denoisers = None if self.denoisers is None else tuple(self.denoisers[step] for step in steps)
        guidance = None if self.guidance is None else guidance_row([self.guidance[step] for step in steps])
        changes = {"steps": len(rows), "keep": rows, "forecast": forecast, "denoisers": denoisers}
        return self._with({"solver": None, "guidance": guidance, **changes})

    def _with(self, changes: Mapping[str, Any]) -> Schedule:
        """With other fields, and the version that they need."""
        fields: dict[str, Any] = {**{name: getattr(self, name) for name in Schedule.model_fields}, **changes}
        needed = {"solver": 2, "forecast": 3, "denoisers": 4, "guidance": 5}
        fields["format_version"] = max([1, *(version for name, version in needed.items() if fields[name] is not None)])
        return Schedule.model_validate(fields)

    @classmethod
    def from_mask(cls, target: MadeFor, mask: Any) -> Schedule:
        """The schedule of a mask: an array, tensor or nested list of 0 and 1 or of booleans.

        Args:
            target: what it is for, as ``dipgo_deploy.models.schedule_target`` gives it.
            mask: (T, N), one row an evaluation and one column a block in order of execution; or (T,), for evaluations
                that run whole or not at all.

        Raises:
            UserError: another shape or value, another number of evaluations, or a block that is skipped before it was
                computed once.
        """
        gates = mask_gates(mask, len(target.block_names))
        sampler = target.sampler
        validation.check_steps(len(gates), target.steps, sampler.class_name, sampler.num_inference_steps)
        return target.schedule(gates, "mask", {})

    @classmethod
    def from_json(cls, text: str | bytes) -> Schedule:
        """Read JSON text; raises UserError for text that is cut off, no JSON, or no valid schedule."""
        arguments.instance("text", text, (str, bytes), "JSON text (str or bytes)")
        document = json_object(text)
        if "format_version" not in document:
            raise UserError("format_version: is missing: not a schedule")
        return cls.model_validate(document)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Schedule:
        """Read a schedule file (at most 16 MiB), or a built-in schedule by its name; a UserError names the file, the
        field and what is wrong."""
        path = schedule_file(arguments.path("path", path))
        if not path.exists():
            raise UserError(f"{path}: no such file, and no built-in schedule, which `dipgo-schedule list` shows")
        data = read_bytes(path)
        try:
            return cls.from_json(data)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the document; the file appears under its name only when it is complete."""
        write_atomic(arguments.path("path", path), self.to_json().encode())


def denoiser_of(block: str) -> str:
    """The denoiser that a block is of, in a model of several."""
    return block.partition(".")[0]


def guidance_row(guidance: Sequence[float] | None) -> tuple[float, ...] | None:
    """The guidance of evaluations as a document has it: None where all have all of it."""
    row = None if guidance is None else tuple(float(share) for share in guidance)
    return None if row is None or all(share == 1 for share in row) else row


def gate_rows(gates: Iterable[Sequence[bool]]) -> tuple[str, ...]:
    """The gates (T x N booleans, or 0 and 1) as strings of 0 and 1; a cell that is neither raises UserError."""
    rows = []
    for step, row in enumerate(gates):
        for column, cell in enumerate(row):
            if cell not in (0, 1):
                raise UserError(f"keep: evaluation {step}, column {column}: {repr(cell)[:60]} is not 0 or 1")
        rows.append("".join("1" if cell else "0" for cell in row))
    return tuple(rows)


def mask_gates(mask: Any, blocks: int) -> Gates:
    """T x N gates from an array of 0 and 1 or of booleans, (T, N) or (T,) for whole evaluations. N = ``blocks``.

    Raises UserError for another shape or value.
    """
    import numpy as np

    array = np.asarray(mask)
    if array.ndim not in (1, 2) or not len(array) or array.shape[1:] not in ((), (blocks,)):
        raise UserError(f"mask: of shape {array.shape}; give (evaluations, {blocks}) or (evaluations,)")
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise UserError("mask: has other values than 0 and 1")
    rows = array.astype(bool).tolist()
    return tuple((row,) * blocks if array.ndim == 1 else tuple(row) for row in rows)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the document (shipped as ``schedule.schema.json``)."""
    schema = Schedule.model_json_schema()
    # The default is for code; a file has to say which version it is.
    schema["required"] = ["format_version", *schema["required"]]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _leaves(schedule: Schedule) -> dict[str, Any]:
    """Every field but the gates by dotted name, one level into the nested parts."""
    leaves: dict[str, Any] = {}
    for name, value in schedule.model_dump(exclude={"keep"}).items():
        if isinstance(value, dict):
            for key, item in value.items():
                if name == "sampler" and key == "config":
                    leaves.update({f"sampler.config.{option}": setting for option, setting in item.items()})
                else:
                    leaves[f"{name}.{key}"] = item
        elif name == "blocks":
            leaves["blocks"] = [f"{block['name']} ({block['cache']})" for block in value]
        else:
            leaves[name] = value
    return leaves
