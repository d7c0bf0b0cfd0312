"""model + schedule -> engine directory: trace once, plan, cut the variants, write the weights once, check, publish."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo_deploy import arguments
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.files import hash_tree
from dipgo_deploy.bundle.manifest import (
    MANIFEST_NAME,
    SCHEDULE_NAME,
    Components,
    ConditionSpec,
    LatentSpec,
    LaunchEntry,
    Layout,
    Manifest,
    ModelEntry,
    PlanEntry,
    SamplerEntry,
    VariantEntry,
)
from dipgo_deploy.bundle.names import STACK, cache_input, cache_output
from dipgo_deploy.bundle.shapes import Range, corners
from dipgo_deploy.bundle.stack import StackLayout
from dipgo_deploy.bundle.staging import check_target, staged_directory
from dipgo_deploy.compare.metrics import Agreement
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.conditions import open_conditions
from dipgo_deploy.export.cut import cut_variant
from dipgo_deploy.export.low_memory import convert_in_place, is_large, load_frugally
from dipgo_deploy.export.program import torch_dtype
from dipgo_deploy.export.segments import cut_segment, read_pieces, reads_of, writes_of
from dipgo_deploy.export.tensors import graph_entry
from dipgo_deploy.export.trace import TracedModel, trace
from dipgo_deploy.export.weights import save_graph, write_weights
from dipgo_deploy.models.files import check_weights, left_out_parts
from dipgo_deploy.models.location import denoiser_config
from dipgo_deploy.models.shape import TraceShape, condition_specs
from dipgo_deploy.models.stock import stock_configuration
from dipgo_deploy.models.target import check_schedule, nominal_set_timesteps
from dipgo_deploy.plan.compile import compile_plan
from dipgo_deploy.plan.layouts import MANY_COPIES, copies_in_variants
from dipgo_deploy.plan.model import Plan
from dipgo_deploy.plan.segments import SegmentPlan, plan_segments
from dipgo_deploy.reference.source import Source, load_source, unloaded_source
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.schedule.frozen import to_json
from dipgo_deploy.schedule.image import ImageRun, image_run

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from dipgo_deploy.models.family import ModelFamily
    from dipgo_deploy.sampler import SamplerMatrix

_log = logging.getLogger(__name__)

GRAPHS = "graphs"
_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "numpy")

Notify = Callable[[str], None]
Agreed = Callable[[Agreement], None]


@dataclass(frozen=True)
class ExportOptions:
    """How a schedule is exported.

    dtype: ``fp32``, ``fp16`` or ``bf16``. batch: images per launch; it, height and width may be ranges. guidance:
    classifier-free guidance inside the graphs (the denoiser sees twice the batch); None: the family's default. height,
    width: in pixels, the model's native size where None. max_variants: raise gates until at most so many graphs are
    left. layout: ``variants`` (a graph for each kind of evaluation) or ``segments`` (each weight in one graph, an
    evaluation is several launches). strength: start from a picture and run this share of the steps, as diffusers'
    image-to-image pipelines do. allow_other_config: accept a schedule made for another configuration of the same class.
    check: compare every graph with the supernet before publishing. components: export text encoder, tokenizer and VAE
    too; without them a bundle takes embeddings and gives latents. low_memory: hold the weights once, and compare in
    processes of their own, after they were released; a planned export can then be written once. None: for large
    weights (``low_memory.LARGE_BYTES``); a planned export says what it became.
    """

    dtype: str = "fp32"
    batch: int | Range = 1
    guidance: bool | None = None
    height: int | Range | None = None
    width: int | Range | None = None
    max_variants: int | None = None
    layout: Layout = "variants"
    strength: float | None = None
    allow_other_config: bool = False
    check: bool = True
    components: bool = True
    overwrite: bool = False
    low_memory: bool | None = None


@dataclass(frozen=True)
class PlannedExport:
    """A traced model with the plan for its schedule; nothing is written yet.

    used: per evaluation, whether the sampler gives any weight to its prediction. segments: only in that layout.
    image: for image-to-image; ``schedule`` then has the evaluations that are run only.
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
    image: ImageRun | None = None

    @property
    def columns(self) -> tuple[int, ...]:
        """The columns of the matrix that have a slot of the stack; predictions that nobody makes have none."""
        made = {1 + launch.prediction for launch in self.plan.launches if launch.prediction is not None}
        chain = 1 + self.matrix.predictions
        return tuple(
            column for column in range(len(self.matrix.final)) if column == 0 or column >= chain or column in made
        )

    @property
    def stack(self) -> StackLayout:
        """The stack: initial noise, predictions, the picture's latents, noise draws."""
        slots = len(self.columns)
        return StackLayout(slots, slots - self.matrix.noises - self.matrix.image)

    @property
    def promoted(self) -> tuple[tuple[int, str], ...]:
        """Gates that were raised, as (row of the whole schedule, block)."""
        return self.plan.promoted if self.image is None else self.image.in_full(self.plan.promoted)

    @property
    def exported_schedule(self) -> Schedule:
        """The whole schedule as it is exported."""
        if self.image is None:
            return self.schedule.with_gates(self.plan.keep, provenance=_provenance(self))
        return self.image.full.with_gates(self.image.whole(self.plan.keep), provenance=_provenance(self))


def plan_export(
    model: str | os.PathLike[str], schedule: Schedule, options: ExportOptions, notify: Notify = lambda stage: None
) -> PlannedExport:
    """Load the model, trace it once and compile the schedule.

    Raises:
        UserError: model or schedule cannot be used, see the message.
    """
    options, model = _checked(model, schedule, options), arguments.path_text("model", model)
    if options.layout == "segments" and options.max_variants is not None:
        raise UserError("--max-variants: not with --layout segments, where no weight is in two graphs; leave it out")
    # Before the model: what its configuration and its files alone decide costs no weights and no trace.
    check_schedule(schedule, model, allow_other_config=options.allow_other_config)
    check_weights(model)
    stock = stock_configuration(model)
    stock.check(schedule.sampler)
    if options.components and (left_out := left_out_parts(model)):
        unchecked = "; nothing checks the pictures" if "safety_checker" in left_out else ""
        _log.warning("%s: the engine directory has no %s%s", model, ", ".join(left_out), unchecked)
    _check_shape(unloaded_source(model, stock), options)
    sampling = _nominal_sampling(model, schedule, options.strength)
    dtype = torch_dtype(options.dtype)
    if options.low_memory is None:
        options = replace(options, low_memory=is_large(model, dtype))
    notify("loading the model" + (", holding its weights once" if options.low_memory else ""))
    source = load_frugally(model, dtype) if options.low_memory else load_source(model)
    source.check(schedule, allow_other_config=options.allow_other_config)
    guidance = source.family.guidance if options.guidance is None else options.guidance
    options = replace(options, guidance=guidance)
    shape = source.trace_shape(batch=options.batch, guidance=guidance, height=options.height, width=options.width)
    sampling = _sampling(source, schedule, shape, options.strength, sampling)
    if shape.sizes is not None:
        _check_open(source, sampling, shape, options, schedule.sampler.num_inference_steps)
        open_conditions(source, shape, options.dtype)  # before the trace: conditions that cannot be told are refused
    notify("tracing the denoiser")
    specs = source.specs(schedule)
    denoiser = source.denoiser if options.dtype == "fp32" else _denoiser_in(source, options, dtype)
    traced = trace(denoiser, source.family, source.config, specs, schedule.cache_kinds, shape, options.dtype)
    notify("planning")
    return _planned(source, schedule, sampling, traced, options)


def replan(planned: PlannedExport, schedule: Schedule) -> PlannedExport:
    """The same trace with another schedule of the same blocks and cache kinds (gates and sampler may differ).

    Raises:
        UserError: blocks or cache kinds differ, which needs a trace of its own.
    """
    if schedule.blocks != planned.schedule.blocks or schedule.model.granularity != planned.schedule.model.granularity:
        raise UserError("the schedules have different blocks or cache kinds; export each on its own")
    planned.source.check(schedule, allow_other_config=planned.options.allow_other_config)
    sampling = _sampling(planned.source, schedule, planned.traced.shape, planned.options.strength)
    return _planned(planned.source, schedule, sampling, planned.traced, planned.options)


def _check_shape(source: Source, options: ExportOptions) -> None:
    """Refuse (UserError) sizes that the model does not take; before anything is loaded."""
    guidance = source.family.guidance if options.guidance is None else options.guidance
    shape = source.trace_shape(batch=options.batch, guidance=guidance, height=options.height, width=options.width)
    condition_specs(source.family, source.config, shape)


@dataclass(frozen=True)
class _Sampling:
    """A schedule's scheduler with what its ``set_timesteps`` is given besides the number of steps.

    used: which evaluations' predictions reach the final latent or a model input. strength, begin: of a run that starts
    from a picture, see ``sampler.begin_of``.
    """

    scheduler: Any
    set_timesteps: Mapping[str, Any]
    used: tuple[bool, ...]
    strength: float | None
    begin: int | None


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
    options = source.set_timesteps(scheduler, shape.height, shape.width, schedule.sampler.num_inference_steps)
    if nominal is not None and options == nominal.set_timesteps:
        return nominal
    return _with_options(source.family, schedule, scheduler, options, strength)


def _check_open(source: Source, sampling: _Sampling, shape: TraceShape, options: ExportOptions, steps: int) -> None:
    """Refuse what open sizes do not go together with."""
    assert shape.sizes is not None
    for option, chosen in (("--layout segments", options.layout == "segments"), ("--strength", options.strength)):
        if chosen:
            raise UserError(f"{option}: not with ranges of sizes; give plain numbers for --batch, --height and --width")
    for height, width in {(size.height, size.width) for size in corners(shape.sizes)}:
        if source.set_timesteps(sampling.scheduler, height, width, steps) != sampling.set_timesteps:
            axis = "--height" if not shape.sizes.height.is_static else "--width"
            raise UserError(
                f"{axis}: the timesteps of {type(sampling.scheduler).__name__} depend on the size here "
                f"({', '.join(sampling.set_timesteps)}); give plain numbers for --height and --width"
            )


def _with_options(
    family: ModelFamily, schedule: Schedule, scheduler: Any, options: Mapping[str, Any], strength: float | None
) -> _Sampling:
    from dipgo_deploy.sampler import begin_of, evaluations, prediction_used, sampler_matrix

    if strength is not None and family.image_to_image is None:
        raise UserError(f"--strength: {family.class_name} cannot start from a picture here; leave it out")
    if strength is not None and schedule.solver is not None and not schedule.solver.picture:
        raise UserError("--strength: the schedule's solver was fitted to runs from noise alone; leave it out")
    steps = schedule.sampler.num_inference_steps
    schedule.check_evaluations(evaluations(scheduler, steps, set_timesteps_kwargs=options))
    begin = None
    if strength is not None and family.image_to_image is not None:
        begin = begin_of(scheduler, steps, strength, family.image_to_image, set_timesteps_kwargs=options)
    matrix = sampler_matrix(scheduler, steps, set_timesteps_kwargs=options, begin=begin)
    return _Sampling(scheduler, options, prediction_used(matrix), strength, begin)


def _planned(
    source: Source, schedule: Schedule, sampling: _Sampling, traced: TracedModel, options: ExportOptions
) -> PlannedExport:
    from dipgo_deploy.sampler import sampler_matrix

    image = None
    if sampling.strength is not None and sampling.begin is not None:
        schedule, image = image_run(schedule, sampling.strength, sampling.begin)
    plan = compile_plan(traced.graph, schedule.gates, max_variants=options.max_variants, prediction_used=sampling.used)
    steps = schedule.sampler.num_inference_steps
    kwargs = sampling.set_timesteps
    matrix = sampler_matrix(sampling.scheduler, steps, plan.source, set_timesteps_kwargs=kwargs, begin=sampling.begin)
    planned = PlannedExport(
        source, schedule, sampling.scheduler, kwargs, traced, plan, matrix, sampling.used, options, image=image
    )
    return planned if options.layout == "variants" else replace(planned, segments=in_segments(planned))


def in_segments(planned: PlannedExport) -> SegmentPlan:
    """The same schedule in the layout ``segments``."""
    pieces = read_pieces(planned.traced)
    return plan_segments(planned.traced.graph, pieces, planned.plan.keep, prediction_used=planned.used)


def with_layout_for_cpu(planned: PlannedExport) -> tuple[PlannedExport, float | None]:
    """The layout that ONNX Runtime on a CPU is better off with, and how many copies of the weights ``variants`` holds.

    Each session re-lays-out its weights for itself, so many variants load slowly and take the memory of as many models;
    segments hold one copy and are as fast. ``variants`` and None where segments cannot be: open sizes, a limit on the
    variants, half precision (which is for GPUs).
    """
    options = planned.options
    if options.dtype != "fp32" or options.max_variants is not None or planned.traced.shape.sizes:
        return planned, None
    copies = copies_in_variants(planned.plan, read_pieces(planned.traced))
    if copies <= MANY_COPIES:
        return planned, copies
    return replace(planned, options=replace(options, layout="segments"), segments=in_segments(planned)), copies


def _checked(model: object, schedule: object, options: ExportOptions) -> ExportOptions:
    """The options, if all types are right; a UserError names the argument that is of another."""
    arguments.path_text("model", model)
    arguments.instance("schedule", schedule, Schedule, "a Schedule (Schedule.load reads one)")
    arguments.instance("options", options, ExportOptions, "ExportOptions")
    arguments.choice("dtype", options.dtype, ("fp32", "fp16", "bf16"))
    arguments.choice("layout", options.layout, ("variants", "segments"))
    for name in ("batch", "height", "width"):
        value = getattr(options, name)
        if not isinstance(value, Range) and not (value is None and name != "batch"):
            arguments.whole(name, value, least=1)
    if options.max_variants is not None:
        arguments.whole("max_variants", options.max_variants, least=1)
    if options.strength is not None:
        arguments.number("strength", options.strength)
    for name in ("allow_other_config", "check", "components", "overwrite"):
        arguments.flag(name, getattr(options, name))
    for name in ("guidance", "low_memory"):
        if getattr(options, name) is not None:
            arguments.flag(name, getattr(options, name))
    return options


def export_bundle(
    model: str | os.PathLike[str],
    schedule: Schedule,
    engine_dir: str | os.PathLike[str],
    options: ExportOptions | None = None,
    notify: Notify = lambda stage: None,
) -> Bundle:
    """Export a schedule into ``engine_dir``, which appears only when everything in it was checked.

    Raises:
        UserError: bad input, an existing target, or a model that cannot be exported.
        ToleranceError: a variant differs from the supernet beyond the family's tolerance.
    """
    options = _checked(model, schedule, options or ExportOptions())
    engine_dir = arguments.path("engine_dir", engine_dir)
    check_target(engine_dir, overwrite=options.overwrite)
    return publish(plan_export(model, schedule, options, notify), engine_dir, notify)


def publish(
    planned: PlannedExport,
    engine_dir: Path,
    notify: Notify = lambda stage: None,
    agreed: Agreed = lambda agreement: None,
    note: Notify = lambda line: None,
) -> Bundle:
    """Write a planned export to ``engine_dir``.

    agreed: told how far the denoiser agrees with the supernet, where they were compared. note: told what was not
    compared, a line each. Raises as ``export_bundle``
    does, and ValueError for an export whose weights were released.
    """
    if next(planned.source.denoiser.parameters()).is_meta:
        raise ValueError("an export with low_memory is written once; plan it again")
    with staged_directory(engine_dir, overwrite=planned.options.overwrite) as stage:
        write_bundle(planned, stage, notify, agreed, note)
    return Bundle.open(engine_dir)


def write_bundle(
    planned: PlannedExport,
    stage: Path,
    notify: Notify = lambda stage: None,
    agreed: Agreed = lambda agreement: None,
    note: Notify = lambda line: None,
) -> Manifest:
    """Write everything of an engine directory into the empty folder ``stage``; see ``publish``."""
    from dipgo_deploy.export.components import export_components

    options, plan = planned.options, planned.plan
    notify(f"cutting {len(plan.variants if planned.segments is None else planned.segments.segments)} {options.layout}")
    variants = write_entries(planned, stage / GRAPHS)
    plan_entry = _plan_entry(planned, variants)
    if options.low_memory:
        _release(planned)
    shape = planned.traced.shape
    latent = LatentSpec(
        channels=planned.source.family.latent_channels(planned.source.config),
        height=shape.height,
        width=shape.width,
        scale=planned.source.scale,
    )
    # Without components too: the unconditional half of guidance needs the null class.
    null = next((spec.null for spec in planned.traced.conditions if spec.source == "class"), None)
    components = Components(null_class=null, classes=planned.source.config.get("num_class_embeds"))
    conditions = _conditions(planned)
    if planned.source.pipeline is not None and options.components:
        notify("exporting text encoder and VAE")
        components = export_components(
            planned.source.pipeline,
            planned.source.text,
            conditions,
            stage,
            latent,
            batch=shape.batch,
            sizes=shape.sizes,
            dtype=options.dtype,
            pixels=planned.source.family.pixels,
            encoder=planned.image is not None,
            float32=planned.source.family.float32_in_fp16 if options.dtype == "fp16" else (),
        )
    planned.exported_schedule.save(stage / SCHEDULE_NAME)
    manifest = _manifest(planned, plan_entry, latent, conditions, components, hash_tree(stage))
    (stage / MANIFEST_NAME).write_text(manifest.dumps(), encoding="utf-8")
    if options.check:
        agreement = _check(planned, Bundle(stage, manifest), notify, note)
        if agreement is not None:
            agreed(agreement)
    return manifest


def _release(planned: PlannedExport) -> None:
    """Drop the weights of a planned export whose graphs are written; it cannot be written again."""
    for value in planned.traced.model.graph.initializers.values():
        value.const_value = None
    planned.source.denoiser.to("meta")


def _check(planned: PlannedExport, bundle: Bundle, notify: Notify, note: Notify) -> Agreement | None:
    """Compare the written directory with the model; how far the denoiser agrees, None for bf16 graphs, which ONNX
    Runtime's CPU provider cannot run."""
    from dipgo_deploy.compare.processes import verify_in_processes
    from dipgo_deploy.compare.written import verify_written

    if planned.options.dtype == "bf16":
        note("nothing was compared: bf16 graphs do not run on a CPU; dipgo-compare does it on a GPU")
        return None
    if not planned.options.low_memory:
        return verify_written(bundle, _in_float32(planned.source, planned.options), notify, note)
    notify(f"comparing the {planned.options.layout} with the supernet")
    agreement = verify_in_processes(bundle.path, planned.source.name)
    note("not compared at this size: the loop, the weights' values, text encoder and VAE; dipgo-compare does it")
    return agreement


def _in_float32(source: Source, options: ExportOptions) -> Source:
    """The model as it was loaded; in half precision the exporter has converted what is beside the denoiser."""
    from dipgo_deploy.supernet.load import load_pipeline

    if options.dtype == "fp32" or not options.components or source.pipeline is None:
        return source
    denoiser: dict[str, Any] = {source.family.component: source.denoiser}
    return replace(source, pipeline=load_pipeline(source.name, **denoiser))


def write_entries(planned: PlannedExport, folder: Path) -> tuple[VariantEntry, ...]:
    """Cut every variant or segment, write the graphs into ``folder`` and say for the manifest what they are."""
    if planned.segments is None:
        graphs = write_variants(planned, folder)
        return tuple(
            VariantEntry(
                name=variant.name,
                graph=graph_entry(graph, f"{GRAPHS}/{variant.name}.onnx", planned.traced.shape.sizes),
                reads=tuple(cache_input(cache.kind, cache.value) for cache in variant.reads),
                writes=tuple(cache_output(cache.kind, cache.value) for cache in variant.writes),
                predicts=variant.predicts,
                macs=variant.macs,
            )
            for variant, graph in zip(planned.plan.variants, graphs, strict=True)
        )
    segments = planned.segments.segments
    graphs = [cut_segment(planned.traced, segment, planned.stack) for segment in segments]
    write_graphs(graphs, folder)
    return tuple(
        VariantEntry(
            name=segment.name,
            graph=graph_entry(graph, f"{GRAPHS}/{segment.name}.onnx"),
            reads=reads_of(segment),
            writes=writes_of(segment),
            predicts=segment.predicts,
            macs=segment.macs,
        )
        for segment, graph in zip(segments, graphs, strict=True)
    )


def write_variants(planned: PlannedExport, folder: Path) -> list[ir.Model]:
    """Cut every variant and write the graphs into ``folder``."""
    graphs = [cut_variant(planned.traced, variant, planned.stack) for variant in planned.plan.variants]
    write_graphs(graphs, folder)
    return graphs


def write_graphs(graphs: list[ir.Model], folder: Path) -> None:
    """Write graphs, under their names, beside their one weights file; full checker and shape inference."""
    import onnx

    folder.mkdir(exist_ok=True)
    write_weights(graphs, folder)
    for graph in graphs:
        path = folder / f"{graph.graph.name}.onnx"
        save_graph(graph, path)
        onnx.checker.check_model(str(path), full_check=True)


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


def _manifest(
    planned: PlannedExport,
    plan: PlanEntry,
    latent: LatentSpec,
    conditions: tuple[ConditionSpec, ...],
    components: Components,
    files: dict[str, str],
) -> Manifest:
    from dipgo_deploy._version import __version__

    source, schedule, options, traced = planned.source, planned.schedule, planned.options, planned.traced
    scaled = traced.shape.guidance or any(spec.source == "guidance" for spec in conditions)
    return Manifest(
        created_by=f"dipgo_deploy {__version__}",
        model=ModelEntry(
            class_name=source.family.class_name,
            name=source.name,
            config_hash=source.config_hash,
            granularity=schedule.model.granularity,
            config={key: value for key, value in source.config.items() if not key.startswith("_")},
        ),
        promoted=planned.promoted,
        sampler=SamplerEntry(
            class_name=planned.matrix.class_name if schedule.solver is None else schedule.sampler.class_name,
            config=dict(planned.matrix.config) if schedule.solver is None else to_json(schedule.sampler.config),
            num_inference_steps=planned.matrix.num_inference_steps,
            set_timesteps=dict(planned.set_timesteps),
            strength=None if planned.image is None else planned.image.strength,
            begin=None if planned.image is None else planned.image.begin,
        ),
        dtype=options.dtype,  # type: ignore[arg-type]
        batch=traced.shape.batch,
        guidance=traced.shape.guidance,
        guidance_scale=source.default_guidance_scale(from_picture=planned.image is not None) if scaled else None,
        latent=latent,
        sizes=traced.shape.sizes,
        conditions=conditions,
        plan=plan,
        components=components,
        tools={name: importlib.metadata.version(name) for name in _TOOLS},
        files=files,
    )


def _conditions(planned: PlannedExport) -> tuple[ConditionSpec, ...]:
    return open_conditions(planned.source, planned.traced.shape, planned.options.dtype)


def _plan_entry(planned: PlannedExport, variants: tuple[VariantEntry, ...]) -> PlanEntry:
    plan, matrix, columns = planned.plan, planned.matrix, planned.columns
    laid_out = planned.segments or plan
    with_stack = {place for place, entry in enumerate(variants) if STACK in {spec.name for spec in entry.graph.inputs}}
    return PlanEntry(
        layout=planned.options.layout,
        variants=variants,
        launches=tuple(
            LaunchEntry(
                step=launch.step,
                variant=launch.variant,
                timestep=float(matrix.timesteps[launch.step]),
                coefficients=tuple(matrix.rows[launch.step, columns].tolist()) if launch.variant in with_stack else (),
                reads=launch.reads,
                writes=launch.writes,
                slot=None if launch.prediction is None else columns.index(1 + launch.prediction),
            )
            for launch in laid_out.launches
        ),
        final=tuple(matrix.final[list(columns)].tolist()),
        slots=len(columns),
        noises=matrix.noises,
        image_slot=planned.stack.chain if matrix.image else None,
        arena_bytes=laid_out.arena_bytes,
        lower_bound_bytes=laid_out.lower_bound_bytes,
        macs_full=plan.macs_full,
        macs_schedule=plan.macs_schedule,
        macs_run=laid_out.macs_run,
        evaluations=len(plan.keep),
    )
