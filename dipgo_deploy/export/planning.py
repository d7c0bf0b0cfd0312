"""Model and schedule, traced once and planned; nothing is written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dipgo_deploy import arguments
from dipgo_deploy.bundle.history import History
from dipgo_deploy.bundle.manifest import Layout
from dipgo_deploy.bundle.shapes import Range, corners
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.conditions import open_conditions
from dipgo_deploy.export.low_memory import convert_in_place, is_large, load_frugally
from dipgo_deploy.export.options import ExportOptions, LayoutChoice, check_options
from dipgo_deploy.export.program import torch_dtype
from dipgo_deploy.export.trace import Beforehand, TracedModel, trace
from dipgo_deploy.export.weighing import weighed_plan
from dipgo_deploy.models.files import check_weights, left_out_parts
from dipgo_deploy.models.location import denoiser_config
from dipgo_deploy.models.shape import TraceShape, check_masks, condition_specs
from dipgo_deploy.models.stock import stock_configuration
from dipgo_deploy.models.target import check_schedule, nominal_set_timesteps, pipelines_denoisers
from dipgo_deploy.plan.compile import compile_plan, demanded
from dipgo_deploy.plan.graph import BlockGraph
from dipgo_deploy.plan.layouts import MANY_COPIES, copies_in_variants
from dipgo_deploy.plan.model import Plan, Variant
from dipgo_deploy.plan.segments import Segment, SegmentPlan, plan_segments
from dipgo_deploy.reference.source import Source, load_source, unloaded_source
from dipgo_deploy.schedule.document import Gates, Schedule
from dipgo_deploy.schedule.image import ImageRun, image_run
from dipgo_deploy.schedule.summary import denoisers_line

if TYPE_CHECKING:
    import os

    import torch

    from dipgo_deploy.models.family import ModelFamily
    from dipgo_deploy.sampler import SamplerMatrix

Notify = Callable[[str], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedExport:
    """A traced model with the plan for its schedule; nothing is written yet.

    Attributes:
        source: the loaded model.
        schedule: the evaluations that are run; of image-to-image the later ones.
        scheduler: its sampler.
        set_timesteps: what that is given besides the number of steps.
        traced: the model's one trace.
        plan: launches of the layout ``variants``.
        matrix: the sampler as coefficients.
        used: per evaluation, whether the sampler gives any weight to its prediction.
        options: as given, with ``guidance``, ``low_memory``, ``timestep_tables`` and ``prologue`` decided.
        segments: the launches in that layout; None where ``variants`` is exported.
        copies: of the weights that graphs of ``variants`` would hold, where ``auto`` chose by them.
        image: for image-to-image.
        name: of the schedule, where a directory gets several.
        others: of the first of several, the names of the others.
        room: entries of the history's chain that graphs have at least, so that schedules share them.
        table_rows: timesteps of the tables, where they are not only its own.
    """

    source: Source
    schedule: Schedule
    scheduler: Any
    set_timesteps: Mapping[str, Any]
    traced: TracedModel
    plan: Plan
    matrix: SamplerMatrix
    used: tuple[bool, ...]
    options: ExportOptions
    segments: SegmentPlan | None = None
    copies: float | None = None
    image: ImageRun | None = None
    name: str = ""
    others: tuple[str, ...] = ()
    room: int = 0
    table_rows: tuple[float, ...] = ()

    @property
    def layout(self) -> Layout:
        """What it became, where the options say ``auto``."""
        return "variants" if self.segments is None else "segments"

    @property
    def units(self) -> tuple[Variant, ...] | tuple[Segment, ...]:
        """What is cut: a graph each."""
        return self.plan.variants if self.segments is None else self.segments.segments

    def alike(self, unit: Variant | Segment) -> Hashable:
        """Units of which this is equal are one graph, also of several exports of one trace."""
        return replace(unit, name=""), self.history

    @property
    def columns(self) -> tuple[int, ...]:
        """The columns of the matrix that have a slot of the history; predictions that nobody makes have none."""
        made = {1 + launch.prediction for launch in self.plan.launches if launch.prediction is not None}
        chain = 1 + self.matrix.predictions
        return tuple(
            column for column in range(len(self.matrix.final)) if column == 0 or column >= chain or column in made
        )

    @property
    def history(self) -> History:
        """The history: initial noise, predictions, spare slots, the picture's latents, noise draws."""
        slots = len(self.columns) + self.spare
        return History(slots, slots - self.matrix.noises - self.matrix.image)

    @property
    def chain(self) -> int:
        """Entries of the history that it fills itself: initial noise and predictions."""
        return len(self.columns) - self.matrix.noises - self.matrix.image

    @property
    def spare(self) -> int:
        """Entries of the history between predictions and what comes behind them, which nothing fills."""
        return max(0, self.room - self.chain)

    @property
    def table_timesteps(self) -> tuple[float, ...]:
        """Timesteps of the rows of the tables, in the order of the launches; none without tables."""
        steps = [launch.step for launch in self.plan.launches] if self.traced.parts else []
        return self.table_rows or tuple(dict.fromkeys(float(self.matrix.timesteps[step]) for step in steps))

    @property
    def promoted(self) -> tuple[tuple[int, str], ...]:
        """Gates that were re-enabled, as (row of the whole schedule, block)."""
        return self.plan.promoted if self.image is None else self.image.in_full(self.plan.promoted)

    @property
    def exported_schedule(self) -> Schedule:
        """The whole schedule as it is exported."""
        if self.image is None:
            return self.schedule.with_gates(self.plan.keep, provenance=_provenance(self))
        return self.image.full.with_gates(self.image.whole(self.plan.keep), provenance=_provenance(self))


def plan_export(
    model: str | os.PathLike[str],
    schedule: Schedule | str | os.PathLike[str],
    options: ExportOptions | None = None,
    notify: Notify = lambda stage: None,
    *,
    conditional: bool = False,
) -> PlannedExport:
    """Load the model, trace it once and compile the schedule.

    conditional: trace it so that schedules with conditional-only evaluations can have the trace, too.

    Raises:
        UserError: model or schedule cannot be used, see the message.
    """
    options = options or ExportOptions()
    model = arguments.path_text("model", model)
    check_options(options)
    schedule = read_schedule(schedule)
    # Before the model: what its configuration and its files alone decide costs no weights and no trace.
    check_schedule(schedule, model, allow_other_config=options.allow_other_config)
    check_weights(model)
    stock = stock_configuration(model)
    stock.check(schedule.sampler)
    if options.components and (left_out := left_out_parts(model)):
        unchecked = "; nothing checks the pictures" if "safety_checker" in left_out else ""
        _log.warning("%s: the engine directory has no %s%s", model, ", ".join(left_out), unchecked)
    unloaded = unloaded_source(model, stock)
    if options.components and unloaded.text is not None and unloaded.text.given:
        _log.warning(
            "%s: its prompt encoder sees the picture, too, and is not exported: calls take prompt_embeds", model
        )
    _check_shape(unloaded, options)
    _check_guidance(unloaded, schedule, options)
    sampling = _nominal_sampling(model, schedule, options.strength)
    _say_denoisers(model, schedule, sampling)
    dtype = torch_dtype(options.dtype)
    if options.low_memory is None:
        options = replace(options, low_memory=is_large(model, dtype))
        check_options(options)
    notify("loading the model" + (", holding its weights once" if options.low_memory else ""))
    source = load_frugally(model, dtype) if options.low_memory else load_source(model)
    source.check(schedule, allow_other_config=options.allow_other_config)
    guidance = source.guided if options.guidance is None else options.guidance
    options = replace(options, guidance=guidance)
    shape = _shape(source, options, guidance)
    sampling = _sampling(source, schedule, shape, options.strength, sampling)
    if shape.sizes is not None:
        _check_open(source, sampling, shape, options, schedule.sampler.num_inference_steps)
        open_conditions(source, shape, options.dtype)  # before the trace: conditions that cannot be told are refused
    notify("tracing the denoiser")
    specs = source.specs(schedule)
    denoiser = source.denoiser if options.dtype == "fp32" else _denoiser_in(source, options, dtype)
    beforehand = Beforehand(
        options.timestep_tables,
        table_classes(source, shape, options),
        options.prologue,
        partial(launched_evaluations, source, schedule, sampling),
    )
    kinds = schedule.cache_kinds
    traced = trace(
        denoiser,
        source.family,
        source.config,
        specs,
        kinds,
        shape,
        options.dtype,
        beforehand=beforehand,
        conditional=conditional or any(schedule.conditional_only),
    )
    options = replace(options, timestep_tables=bool(traced.parts), prologue=traced.prologue is not None)
    notify("planning")
    return _planned(source, schedule, sampling, traced, options)


def replan(planned: PlannedExport, schedule: Schedule) -> PlannedExport:
    """The same trace with another schedule of the same blocks and cache kinds (gates and sampler may differ).

    Raises:
        UserError: blocks or cache kinds differ, which needs a trace of its own.
    """
    if schedule.blocks != planned.schedule.blocks or schedule.model.granularity != planned.schedule.model.granularity:
        raise UserError("the schedules have different blocks or cache kinds; export each on its own")
    if any(schedule.conditional_only) and not planned.traced.graph.conditional_only:
        raise UserError(
            "the schedule has conditional-only evaluations, for which the model was not traced; plan it anew"
        )
    planned.source.check(schedule, allow_other_config=planned.options.allow_other_config)
    _check_guidance(planned.source, schedule, planned.options)
    shape, options = planned.traced.shape, planned.options
    sampling = _sampling(planned.source, schedule, shape, options.strength)
    if shape.sizes is not None:
        _check_open(planned.source, sampling, shape, options, schedule.sampler.num_inference_steps)
    return _planned(planned.source, schedule, sampling, planned.traced, planned.options)


def _shape(source: Source, options: ExportOptions, guidance: bool) -> TraceShape:
    shape = source.trace_shape(
        batch=options.batch,
        guidance=guidance,
        height=options.height,
        width=options.width,
        num_frames=options.num_frames,
    )
    return replace(shape, apart=options.guidance_batch == 1)


def _check_shape(source: Source, options: ExportOptions) -> None:
    """Refuse (UserError) sizes that the model does not take; before anything is loaded."""
    guidance = source.guided if options.guidance is None else options.guidance
    shape = _shape(source, options, guidance)
    check_masks(condition_specs(source.family, source.config, shape), source.family, source.scale, source.time_scale)
    table_classes(source, shape, options)


def _check_guidance(source: Source, schedule: Schedule, options: ExportOptions) -> None:
    """Refuse (UserError) a schedule's guidance, or to launch its halves apart, where there is nothing to guide away
    from, or with open sizes."""
    guided = source.guided if options.guidance is None else options.guidance
    if options.guidance_batch == 1 and not guided:
        why = "is distilled from guidance" if source.distilled else "has no guidance here"
        raise UserError(f"--guidance-batch 1: {source.family.class_name} {why}, so there are no halves; leave it out")
    if schedule.guidance is None:
        return
    if not guided and source.distilled:
        raise UserError(
            f"guidance: {source.family.class_name} is distilled from guidance: its scale is an input, and there is no "
            "unconditional half to leave out; take the guidance out of the schedule"
        )
    if not guided:
        raise UserError("guidance: the export has none; give --guidance, or take the guidance out of the schedule")
    ranges = [name for name in ("batch", "height", "width") if isinstance(getattr(options, name), Range)]
    if ranges and any(schedule.conditional_only) and options.guidance_batch == 2:
        raise UserError(
            f"--{ranges[0]}: a range does not go with conditional-only evaluations, which read the second halves of "
            "caches where they lie; give a plain number, or --guidance-batch 1"
        )


def table_classes(source: Source, shape: TraceShape, options: ExportOptions) -> tuple[int, ...]:
    """The classes of the tables that ``class_labels`` asks for, with the null class where guidance needs it.

    Raises:
        UserError: the model takes no classes, or has not one of them; ranges of batches.
    """
    labels = tuple(options.class_labels)
    if not labels:
        return ()
    spec = next((s for s in condition_specs(source.family, source.config, shape) if s.source == "class"), None)
    if spec is None:
        raise UserError(f"--class-labels: {source.family.class_name} takes no classes here; leave it out")
    if shape.sizes is not None and not shape.sizes.batch.is_static:
        raise UserError("--class-labels: not with a range for --batch; give a plain number")
    count = int(source.config["num_class_embeds"]) if spec.null is None else spec.null + 1
    beyond = next((label for label in labels if label >= count), None)
    if beyond is not None:
        raise UserError(f"--class-labels {beyond}: the model has the classes 0 to {count - 1}")
    null = () if spec.null is None or not shape.guidance else (spec.null,)
    return tuple(dict.fromkeys((*labels, *null)))


@dataclass(frozen=True)
class _Sampling:
    """A schedule's scheduler with what its ``set_timesteps`` is given besides the number of steps.

    Attributes:
        used: which evaluations' predictions reach the final latent or a model input.
        strength, begin: of a run that starts from a picture, see ``sampler.begin_of``.
    """

    scheduler: Any
    set_timesteps: Mapping[str, Any]
    used: tuple[bool, ...]
    strength: float | None
    begin: int | None


def nominal_used(model: str, schedule: Schedule) -> tuple[bool, ...]:
    """Per evaluation, whether the sampler gives any weight to its prediction, at the model's native size.

    Raises:
        UserError: a sampler whose steps are not linear, or another number of evaluations.
    """
    return _nominal_sampling(model, schedule, None).used


def _nominal_sampling(model: str, schedule: Schedule, strength: float | None) -> _Sampling:
    """Of the model's native size; reads its configuration only."""
    from dipgo_deploy.sampler import scheduler_of

    family, config = denoiser_config(model)
    scheduler = scheduler_of(schedule)
    options = nominal_set_timesteps(family, config, scheduler, schedule.sampler.num_inference_steps)
    return _with_options(family, schedule, scheduler, options, strength)


def _sampling(
    source: Source, schedule: Schedule, shape: TraceShape, strength: float | None, nominal: _Sampling | None = None
) -> _Sampling:
    """Of the size that is exported; ``nominal`` where it is the same."""
    from dipgo_deploy.sampler import scheduler_of

    scheduler = scheduler_of(schedule) if nominal is None else nominal.scheduler
    options = source.set_timesteps(scheduler, shape.extents, schedule.sampler.num_inference_steps)
    if nominal is not None and options == nominal.set_timesteps:
        return nominal
    return _with_options(source.family, schedule, scheduler, options, strength)


def _check_open(source: Source, sampling: _Sampling, shape: TraceShape, options: ExportOptions, steps: int) -> None:
    """Refuse what open sizes do not go together with."""
    assert shape.sizes is not None
    for option, chosen in (("--layout segments", options.layout == "segments"), ("--strength", options.strength)):
        if chosen:
            raise UserError(f"{option}: not with ranges of sizes; give plain numbers for --batch, --height and --width")
    for extents in {shape.at(sizes).extents for sizes in corners(shape.sizes)}:
        if source.set_timesteps(sampling.scheduler, extents, steps) != sampling.set_timesteps:
            axis = "--height" if not shape.sizes.height.is_static else "--width"
            raise UserError(
                f"{axis}: the timesteps of {type(sampling.scheduler).__name__} depend on the size here "
                f"({', '.join(sampling.set_timesteps)}); give plain numbers for --height and --width"
            )


def _say_denoisers(model: str, schedule: Schedule, sampling: _Sampling) -> None:
    """One line in the log where the schedule runs others than the model's own pipeline."""
    from dipgo_deploy.sampler.schedulers import timesteps_of

    if schedule.denoisers is None:
        return
    steps = schedule.sampler.num_inference_steps
    timesteps = timesteps_of(sampling.scheduler, steps, set_timesteps_kwargs=sampling.set_timesteps)
    own = pipelines_denoisers(schedule, model, timesteps)
    if own != schedule.denoisers:
        _log.warning(
            "the schedule's denoisers are %s, those of the model's own pipeline %s: make the schedule again for the "
            "videos that diffusers makes",
            denoisers_line(schedule.denoisers),
            denoisers_line(own),
        )


def _with_options(
    family: ModelFamily, schedule: Schedule, scheduler: Any, options: Mapping[str, Any], strength: float | None
) -> _Sampling:
    from dipgo_deploy.sampler import begin_of, evaluations, prediction_used, sampler_matrix

    if strength is not None and family.image_to_image is None:
        raise UserError(f"--strength: {family.class_name} cannot start from a picture here; leave it out")
    if schedule.solver is not None and schedule.solver.picture:
        raise UserError("solver.picture: solvers of runs that start from a picture cannot be exported; fit it without")
    if strength is not None and schedule.solver is not None:
        raise UserError(
            "--strength: the schedule's solver was fitted to runs from noise alone and has no weights for a picture; "
            "leave it out, or export the schedule that the solver was fitted to, which runs its sampler"
        )
    if strength is None and family.starts:
        raise UserError(f"--strength: missing; {family.class_name} works from a picture; give one, such as 0.3")
    if strength == 1 and family.pictures:
        raise UserError(f"--strength 1: {family.class_name} draws from noise alone then; leave it out")
    steps = schedule.sampler.num_inference_steps
    schedule.check_evaluations(evaluations(scheduler, steps, set_timesteps_kwargs=options))
    begin = None
    if strength is not None and family.image_to_image is not None:
        begin = begin_of(scheduler, steps, strength, family.image_to_image, set_timesteps_kwargs=options)
    matrix = sampler_matrix(scheduler, steps, set_timesteps_kwargs=options, begin=begin)
    return _Sampling(scheduler, options, prediction_used(matrix), strength, begin)


def compiled_schedule(
    traced: TracedModel,
    schedule: Schedule,
    used: tuple[bool, ...],
    options: ExportOptions,
    *,
    denoisers: tuple[int, ...] | None = None,
    like: Iterable[Variant] = (),
    by_gates: bool = False,
    say: Notify = lambda line: None,
) -> Plan:
    """The plan of a schedule on a trace, with the graphs that the options leave it.

    Args:
        used: per evaluation, whether the sampler gives any weight to its prediction.
        denoisers, like: see ``compile_plan``.
        by_gates: only what the gates of the plan say by themselves, so that a schedule with them is the same plan. A
            merge may also compute what has no gate, or nobody needs.
        say: told what became of it where graphs are weighed.

    Raises:
        UserError: see ``compile_plan``.
    """

    def compiled(gates: Gates, variants: int | None) -> Plan:
        return compile_plan(
            traced.graph,
            gates,
            denoisers=denoisers,
            max_variants=variants,
            prediction_used=used,
            forecast=schedule.forecast,
            guidance=schedule.guidance,
            like=like,
        )

    def at_most(variants: int | None) -> Plan:
        plan = compiled(schedule.gates, variants)
        return compiled(plan.keep, None) if by_gates and variants is not None else plan

    if options.graph_costs is None:
        return at_most(options.max_variants)

    def segments(plan: Plan) -> SegmentPlan | None:
        layout = _auto_layout(plan, traced, options)[0] if options.layout == "auto" else options.layout
        return _segments(traced, schedule, used, denoisers, plan.keep) if layout == "segments" else None

    plan, line = weighed_plan(schedule, traced.pieces, options.graph_costs, at_most, segments)
    say(line)
    return plan


def compiled_like(planned: PlannedExport, like: Iterable[Variant]) -> Plan:
    """The plan with variants that write what those of other schedules write, see ``compile_plan``."""
    denoisers = denoiser_numbers(planned.source.family, planned.schedule)
    return compiled_schedule(
        planned.traced, planned.schedule, planned.used, planned.options, denoisers=denoisers, like=like
    )


def launched_evaluations(source: Source, schedule: Schedule, sampling: _Sampling, graph: BlockGraph) -> int:
    """How many evaluations have launches; those whose prediction is the last one again have none."""
    schedule, _ = _started(schedule, sampling)
    found = demanded(
        graph,
        schedule.gates,
        denoisers=denoiser_numbers(source.family, schedule),
        prediction_used=sampling.used,
        forecast=schedule.forecast,
        guidance=schedule.guidance,
    )
    return len(found.demand.launches)


def _started(schedule: Schedule, sampling: _Sampling) -> tuple[Schedule, ImageRun | None]:
    """The evaluations that are run: of image-to-image the later ones, and what was done to the schedule for it."""
    if sampling.strength is None or sampling.begin is None:
        return schedule, None
    return image_run(schedule, sampling.strength, sampling.begin)


def _planned(
    source: Source, schedule: Schedule, sampling: _Sampling, traced: TracedModel, options: ExportOptions
) -> PlannedExport:
    from dipgo_deploy.sampler import sampler_matrix

    schedule, image = _started(schedule, sampling)
    plan = compiled_schedule(
        traced,
        schedule,
        sampling.used,
        options,
        denoisers=denoiser_numbers(source.family, schedule),
        say=lambda line: _log.warning("--graph-costs: %s", line),
    )
    steps = schedule.sampler.num_inference_steps
    kwargs = sampling.set_timesteps
    # Not checked again: it is the matrix that _with_options checked, with some columns added up.
    matrix = sampler_matrix(
        sampling.scheduler,
        steps,
        plan.prediction_slots,
        set_timesteps_kwargs=kwargs,
        begin=sampling.begin,
        check=False,
    )
    planned = PlannedExport(
        source, schedule, sampling.scheduler, kwargs, traced, plan, matrix, sampling.used, options, image=image
    )
    return in_layout(planned, options.layout)


def read_schedule(schedule: object) -> Schedule:
    """A schedule, or the one in a file. Raises UserError for anything else, and as ``Schedule.load`` does."""
    return schedule if isinstance(schedule, Schedule) else Schedule.load(arguments.path("schedule", schedule))


def in_segments(planned: PlannedExport) -> SegmentPlan:
    """The same schedule in the layout ``segments``."""
    denoisers = denoiser_numbers(planned.source.family, planned.schedule)
    return _segments(planned.traced, planned.schedule, planned.used, denoisers, planned.plan.keep)


def _segments(
    traced: TracedModel, schedule: Schedule, used: tuple[bool, ...], denoisers: tuple[int, ...] | None, gates: Gates
) -> SegmentPlan:
    return plan_segments(
        traced.graph,
        traced.pieces,
        gates,
        denoisers=denoisers,
        prediction_used=used,
        forecast=schedule.forecast,
        guidance=schedule.guidance,
    )


def denoiser_numbers(family: ModelFamily, schedule: Schedule) -> tuple[int, ...]:
    """Of each evaluation, the place of its denoiser among the family's."""
    names = schedule.denoisers or family.denoisers[:1] * schedule.steps
    return tuple(map(family.denoisers.index, names))


def in_layout(planned: PlannedExport, layout: LayoutChoice) -> PlannedExport:
    """The same trace and schedule in another layout; ``auto`` as ``ExportOptions`` has it.

    ``auto`` looks at what ONNX Runtime on a CPU is better off with, where each session re-lays-out its weights for
    itself. It is ``variants`` where segments cannot be (open sizes, a limit on the variants) and in half precision,
    which is for GPUs.
    """
    options, copies = replace(planned.options, layout=layout), None
    if layout == "auto":
        layout, copies = _auto_layout(planned.plan, planned.traced, options)
    segments = in_segments(planned) if layout == "segments" else None
    return replace(planned, options=options, segments=segments, copies=copies)


def _auto_layout(plan: Plan, traced: TracedModel, options: ExportOptions) -> tuple[Layout, float | None]:
    """What ``auto`` takes, and the copies of the weights in graphs of ``variants`` where it looked at them."""
    if options.dtype != "fp32" or options.max_variants is not None or traced.shape.sizes is not None:
        return "variants", None
    copies = copies_in_variants(plan, traced.pieces)
    return ("segments" if copies > MANY_COPIES else "variants"), copies


def _denoiser_in(source: Source, options: ExportOptions, dtype: torch.dtype) -> Any:
    """The denoiser in another dtype, loaded again so that the float32 reference stays as it is; with ``low_memory``
    there is none."""
    from dipgo_deploy.export.upcast import keep_upcast_attention
    from dipgo_deploy.supernet.load import load_denoiser

    if options.low_memory and convert_in_place(source.denoiser, dtype):
        denoiser = source.denoiser
    else:
        denoiser = load_denoiser(source.name, dtype)[0]
    keep_upcast_attention(denoiser)
    return denoiser


def _provenance(planned: PlannedExport) -> Mapping[str, Any]:
    given = dict(planned.schedule.provenance)
    if planned.promoted:
        given["promoted"] = [[step, block] for step, block in planned.promoted]
    return given
