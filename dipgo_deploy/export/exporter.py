"""model + schedule -> engine directory: trace once, plan, cut the variants, write the weights once, check, publish."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.files import check_target, hash_tree, staged_directory
from dipgo_deploy.bundle.manifest import (
    MANIFEST_NAME,
    SCHEDULE_NAME,
    Components,
    LatentSpec,
    LaunchEntry,
    Manifest,
    ModelEntry,
    PlanEntry,
    SamplerEntry,
    TensorSpec,
    VariantEntry,
)
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.cut import cache_input, cache_output, cut_variant
from dipgo_deploy.export.program import torch_dtype
from dipgo_deploy.export.source import Source, load_source
from dipgo_deploy.export.tensors import graph_entry
from dipgo_deploy.export.trace import TracedModel, trace
from dipgo_deploy.export.weights import save_graph, write_weights
from dipgo_deploy.plan.compile import compile_plan
from dipgo_deploy.plan.model import Plan
from dipgo_deploy.schedule.document import Schedule

if TYPE_CHECKING:
    import onnx_ir as ir

    from dipgo_deploy.sampler import SamplerMatrix

GRAPHS = "graphs"
_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "numpy")
_TENSOR_DTYPES: Mapping[str, Any] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

Notify = Callable[[str], None]


@dataclass(frozen=True)
class ExportOptions:
    """How a schedule is exported.

    dtype: ``fp32``, ``fp16`` or ``bf16``. batch: images per launch. guidance: classifier-free guidance inside the
    graphs (the denoiser sees twice the batch). height, width: in pixels, the model's native size where None.
    max_variants: raise gates until at most so many graphs are left. allow_other_config: accept a schedule made for
    another configuration of the same class. check: compare every variant with the supernet before publishing.
    components: export text encoder, tokenizer and VAE too; without them a bundle takes embeddings and gives latents.
    """

    dtype: str = "fp32"
    batch: int = 1
    guidance: bool = True
    height: int | None = None
    width: int | None = None
    max_variants: int | None = None
    allow_other_config: bool = False
    check: bool = True
    components: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class PlannedExport:
    """A traced model with the plan for its schedule; nothing is written yet."""

    source: Source
    schedule: Schedule
    scheduler: Any
    traced: TracedModel
    plan: Plan
    matrix: SamplerMatrix
    options: ExportOptions

    @property
    def slots(self) -> int:
        """Entries of the stack: initial noise, predictions, noise draws."""
        return 1 + self.matrix.predictions + self.matrix.noises


def plan_export(
    model: str, schedule: Schedule, options: ExportOptions, notify: Notify = lambda stage: None
) -> PlannedExport:
    """Load the model, trace it once and compile the schedule.

    Raises:
        UserError: model or schedule cannot be used, see the message.
    """
    sampling = _sampling(schedule)  # before the model: a sampler that is refused costs no trace
    notify("loading the model")
    source = load_source(model)
    source.check(schedule, allow_other_config=options.allow_other_config)
    shape = source.trace_shape(
        batch=options.batch, guidance=options.guidance, height=options.height, width=options.width
    )
    notify("tracing the denoiser")
    specs = source.specs(schedule)
    denoiser = source.denoiser if options.dtype == "fp32" else _denoiser_in(source, options.dtype)
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
    return _planned(planned.source, schedule, _sampling(schedule), planned.traced, planned.options)


@dataclass(frozen=True)
class _Sampling:
    """A schedule's scheduler; ``used`` says which evaluations' predictions reach the final latent or a model input."""

    scheduler: Any
    used: tuple[bool, ...]


def _sampling(schedule: Schedule) -> _Sampling:
    from dipgo_deploy.sampler import evaluations, make_scheduler, prediction_used, sampler_matrix

    scheduler = make_scheduler(schedule.sampler.class_name, schedule.sampler.config)
    steps = schedule.sampler.num_inference_steps
    schedule.check_evaluations(evaluations(scheduler, steps))
    return _Sampling(scheduler, prediction_used(sampler_matrix(scheduler, steps)))


def _planned(
    source: Source, schedule: Schedule, sampling: _Sampling, traced: TracedModel, options: ExportOptions
) -> PlannedExport:
    from dipgo_deploy.sampler import sampler_matrix

    plan = compile_plan(traced.graph, schedule.gates, max_variants=options.max_variants, prediction_used=sampling.used)
    matrix = sampler_matrix(sampling.scheduler, schedule.sampler.num_inference_steps, plan.source)
    return PlannedExport(source, schedule, sampling.scheduler, traced, plan, matrix, options)


def export_bundle(
    model: str,
    schedule: Schedule,
    engine_dir: Path,
    options: ExportOptions | None = None,
    notify: Notify = lambda stage: None,
) -> Bundle:
    """Export a schedule into ``engine_dir``, which appears only when everything in it was checked.

    Raises:
        UserError: bad input, an existing target, or a model that cannot be exported.
        ToleranceError: a variant differs from the supernet beyond the family's tolerance.
    """
    options = options or ExportOptions()
    check_target(engine_dir, overwrite=options.overwrite)
    return publish(plan_export(model, schedule, options, notify), engine_dir, notify)


def publish(planned: PlannedExport, engine_dir: Path, notify: Notify = lambda stage: None) -> Bundle:
    """Write a planned export to ``engine_dir``; raises as ``export_bundle`` does."""
    with staged_directory(engine_dir, overwrite=planned.options.overwrite) as stage:
        write_bundle(planned, stage, notify)
    return Bundle.open(engine_dir)


def write_bundle(planned: PlannedExport, stage: Path, notify: Notify = lambda stage: None) -> Manifest:
    """Write everything of an engine directory into the empty folder ``stage``."""
    from dipgo_deploy.export.check import check_variants
    from dipgo_deploy.export.components import export_components

    options, plan, schedule = planned.options, planned.plan, planned.schedule
    notify(f"cutting {len(plan.variants)} variants")
    graphs = write_variants(planned, stage / GRAPHS)
    variants = tuple(
        VariantEntry(
            name=variant.name,
            graph=graph_entry(graph, f"{GRAPHS}/{variant.name}.onnx"),
            reads=tuple(cache_input(cache) for cache in variant.reads),
            writes=tuple(cache_output(cache) for cache in variant.writes),
            predicts=variant.predicts,
            macs=variant.macs,
        )
        for variant, graph in zip(plan.variants, graphs, strict=True)
    )
    if options.check:
        notify("comparing the variants with the supernet")
        check_variants(planned, variants, stage)
    shape = planned.traced.shape
    latent = LatentSpec(
        channels=planned.source.family.latent_channels(planned.source.config), height=shape.height, width=shape.width
    )
    components = Components()
    if planned.source.pipeline is not None and options.components:
        notify("exporting text encoder and VAE")
        components = export_components(planned.source.pipeline, stage, latent, batch=options.batch, dtype=options.dtype)
    schedule.with_gates(plan.keep, provenance=_provenance(planned)).save(stage / SCHEDULE_NAME)
    manifest = _manifest(planned, variants, latent, components, hash_tree(stage))
    (stage / MANIFEST_NAME).write_text(manifest.dumps(), encoding="utf-8")
    return manifest


def write_variants(planned: PlannedExport, folder: Path) -> list[ir.Model]:
    """Cut every variant and write the graphs beside their one weights file; full checker and shape inference."""
    import onnx

    folder.mkdir(exist_ok=True)
    graphs = [cut_variant(planned.traced, variant, planned.slots) for variant in planned.plan.variants]
    write_weights(graphs, folder)
    for variant, graph in zip(planned.plan.variants, graphs, strict=True):
        path = folder / f"{variant.name}.onnx"
        save_graph(graph, path)
        onnx.checker.check_model(str(path), full_check=True)
    return graphs


def _denoiser_in(source: Source, dtype: str) -> Any:
    """The denoiser in another dtype, loaded again so that the float32 reference stays as it is."""
    from dipgo_deploy.supernet.load import load_denoiser

    return load_denoiser(source.name, torch_dtype(dtype))[0]


def _provenance(planned: PlannedExport) -> Mapping[str, Any]:
    given = dict(planned.schedule.provenance)
    if planned.plan.promoted:
        given["promoted"] = [[step, block] for step, block in planned.plan.promoted]
    return given


def _manifest(
    planned: PlannedExport,
    variants: tuple[VariantEntry, ...],
    latent: LatentSpec,
    components: Components,
    files: dict[str, str],
) -> Manifest:
    from dipgo_deploy import __version__

    source, schedule, options, traced = planned.source, planned.schedule, planned.options, planned.traced
    return Manifest(
        created_by=f"dipgo_deploy {__version__}",
        model=ModelEntry(
            class_name=source.family.class_name,
            name=source.name,
            config_hash=source.config_hash,
            granularity=schedule.model.granularity,
            config={key: value for key, value in source.config.items() if not key.startswith("_")},
        ),
        promoted=planned.plan.promoted,
        sampler=SamplerEntry(
            class_name=planned.matrix.class_name,
            config=dict(planned.matrix.config),
            num_inference_steps=planned.matrix.num_inference_steps,
        ),
        dtype=options.dtype,  # type: ignore[arg-type]
        batch=options.batch,
        guidance=options.guidance,
        guidance_scale=source.default_guidance_scale() if options.guidance else None,
        latent=latent,
        conditions=tuple(
            TensorSpec(
                name=spec.name,
                shape=spec.shape,
                dtype=_TENSOR_DTYPES[options.dtype] if spec.dtype == "model" else spec.dtype,
            )
            for spec in traced.conditions
        ),
        plan=_plan_entry(planned, variants),
        components=components,
        tools={name: importlib.metadata.version(name) for name in _TOOLS},
        files=files,
    )


def _plan_entry(planned: PlannedExport, variants: tuple[VariantEntry, ...]) -> PlanEntry:
    plan, matrix = planned.plan, planned.matrix
    return PlanEntry(
        variants=variants,
        launches=tuple(
            LaunchEntry(
                step=launch.step,
                variant=launch.variant,
                timestep=float(matrix.timesteps[launch.step]),
                coefficients=tuple(float(weight) for weight in matrix.rows[launch.step]),
                reads=launch.reads,
                writes=launch.writes,
                slot=None if launch.prediction is None else 1 + launch.prediction,
            )
            for launch in plan.launches
        ),
        final=tuple(float(weight) for weight in matrix.final),
        slots=planned.slots,
        noises=matrix.noises,
        arena_bytes=plan.arena_bytes,
        lower_bound_bytes=plan.lower_bound_bytes,
        macs_full=plan.macs_full,
        macs_schedule=plan.macs_schedule,
        macs_run=plan.macs_run,
        evaluations=len(plan.keep),
    )
