"""A planned export becomes an engine directory: cut the graphs, write the weights once, check, publish."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from dipgo_deploy._version import __version__
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.files import hash_tree, sha256_file
from dipgo_deploy.bundle.manifest import (
    MANIFEST_NAME,
    SCHEDULE_NAME,
    Components,
    ConditionSpec,
    Graph,
    LatentSpec,
    LaunchEntry,
    Manifest,
    ModelEntry,
    PlanEntry,
    QuantizationEntry,
    SamplerEntry,
    VariantEntry,
)
from dipgo_deploy.bundle.names import HISTORY, cache_input, cache_output
from dipgo_deploy.bundle.prologue import PROLOGUE_NAME
from dipgo_deploy.bundle.quantized import ACTIVATIONS, Method
from dipgo_deploy.bundle.self_test import MOST_BYTES, SMALL_BYTES, self_test_file, write_self_test
from dipgo_deploy.bundle.staging import staged_directory
from dipgo_deploy.bundle.tables import TABLES_NAME
from dipgo_deploy.compare.metrics import Agreement
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.calibrated import BUDGET, Request, check_recordable, quantize_directory
from dipgo_deploy.export.conditions import open_conditions
from dipgo_deploy.export.cut import cache_key, cut_variant
from dipgo_deploy.export.options import ExportOptions
from dipgo_deploy.export.planning import Notify, PlannedExport, denoiser_numbers
from dipgo_deploy.export.quantized import quantize_weights
from dipgo_deploy.export.segments import cut_segment, reads_of, writes_of
from dipgo_deploy.export.tensors import graph_entry
from dipgo_deploy.export.weights import write_graphs
from dipgo_deploy.plan.model import Variant
from dipgo_deploy.plan.segments import Segment
from dipgo_deploy.reference.source import Source
from dipgo_deploy.schedule.frozen import to_json
from dipgo_deploy.schedule.guidance import HALVES

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from dipgo_deploy.compare.self_test import SelfTestRecorder

Agreed = Callable[[Agreement], None]

_log = logging.getLogger(__name__)

GRAPHS = "graphs"
SCHEDULES = "schedules"
_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "numpy")


def warn(line: str) -> None:
    """Where notes go that nobody asked for."""
    _log.warning("%s", line)


def publish(
    planned: PlannedExport | Sequence[PlannedExport],
    engine_dir: Path,
    notify: Notify = lambda stage: None,
    agreed: Agreed = lambda agreement: None,
    note: Notify = warn,
) -> Bundle:
    """Write a planned export, or several of one trace that were ``joined``, to ``engine_dir``.

    ``notify``, ``agreed`` and ``note`` as ``export_bundle`` has them. Raises as it does, and ValueError for an export
    whose weights were released.
    """
    first = _all(planned)[0]
    if next(first.source.denoiser.parameters()).is_meta:
        raise ValueError("an export with low_memory is written once; plan it again")
    with staged_directory(engine_dir, overwrite=first.options.overwrite) as stage:
        write_bundle(planned, stage, notify, agreed, note)
    return Bundle.open(engine_dir)


def _all(planned: PlannedExport | Sequence[PlannedExport]) -> tuple[PlannedExport, ...]:
    return (planned,) if isinstance(planned, PlannedExport) else tuple(planned)


def write_bundle(
    planned: PlannedExport | Sequence[PlannedExport],
    stage: Path,
    notify: Notify = lambda stage: None,
    agreed: Agreed = lambda agreement: None,
    note: Notify = warn,
    *,
    model_name: str | None = None,
) -> Manifest:
    """Write everything of an engine directory into the empty folder ``stage``; see ``publish``.

    model_name: what the manifests call the model, if not ``source.name``. Returns the first schedule's manifest.
    """
    exports = _all(planned)
    written = write_entries(exports, stage / GRAPHS)
    notify(f"cut {len({entry.graph.file for entries in written.entries for entry in entries})} graphs")
    plans = [
        _plan_entry(export, entries, written.prologue) for export, entries in zip(exports, written.entries, strict=True)
    ]
    if exports[0].options.low_memory:
        _release(exports[0])
    latent, conditions, components = _around(exports[0], stage, notify)
    manifests = []
    for export, plan in zip(exports, plans, strict=True):
        name = model_name or export.source.name
        manifests.append(_manifest(export, name, plan, written.quantization, latent, conditions, components))
        path = stage / manifests[-1].schedule
        path.parent.mkdir(parents=True, exist_ok=True)
        export.exported_schedule.save(path)
    method = exports[0].options.quantize
    if method in ACTIVATIONS:
        for manifest in manifests:
            check_recordable(manifest, method)
    content = hash_tree(stage)
    manifests = _write_manifests(stage, manifests, content)
    if method in ACTIVATIONS:
        entry = _quantized(exports[0], method, stage, manifests, notify)
        content = {name: sha256_file(stage / name) for name in content}
        manifests = [manifest.model_copy(update={"quantization": entry}) for manifest in manifests]
        manifests = _write_manifests(stage, manifests, content)
    for export, manifest in zip(exports, manifests, strict=True):
        bundle = Bundle(stage, manifest)
        recorder = _self_test_recorder(export, bundle, note)
        if export.options.check:
            agreement = _check(export, bundle, notify, note, recorder)
            if agreement is not None:
                agreed(agreement)
        if recorder is not None:
            _write_self_test(export, bundle, recorder, notify)
            content[self_test_file(manifest)] = sha256_file(stage / self_test_file(manifest))
    return _write_manifests(stage, manifests, content)[0]


def _quantized(
    planned: PlannedExport, method: Method, stage: Path, manifests: Sequence[Manifest], notify: Notify
) -> QuantizationEntry:
    """Write the graphs anew, with activations in 8 bits too."""
    options = planned.options
    blocks = {spec.name: spec.modules for spec in planned.source.specs(planned.schedule)}
    budget = BUDGET if options.quantize_budget is None else options.quantize_budget
    request = Request(method, options.calibration_samples, options.calibration_prompts, budget)
    return quantize_directory(stage, manifests, blocks, request, notify)


def _write_manifests(stage: Path, manifests: Sequence[Manifest], content: Mapping[str, str]) -> list[Manifest]:
    """Write the manifests with the digests of their files, the first last: it has those of the others, and of all.

    content: sha256 of every file that is no manifest. Returns them as they were written, in their order.
    """
    of_graphs = {variant.graph.file for manifest in manifests for variant in manifest.plan.variants}
    folders = {manifest.folder for manifest in manifests} - {manifests[0].folder}
    known = dict(content)
    written = []
    for place, manifest in [*enumerate(manifests)][::-1]:
        own = {variant.graph.file for variant in manifest.plan.variants}
        others = folders - {manifest.folder}
        files = {
            name: digest
            for name, digest in known.items()
            if place == 0
            or (
                (name in own or name not in of_graphs)
                and not any(PurePosixPath(name).is_relative_to(folder) for folder in others)
                and name not in (manifests[0].schedule, self_test_file(manifests[0]))
                and PurePosixPath(name).name != MANIFEST_NAME
            )
        }
        manifest = manifest.model_copy(update={"files": dict(sorted(files.items()))})
        path = stage / manifest.folder / MANIFEST_NAME
        path.write_text(manifest.dumps(), encoding="utf-8")
        known[path.relative_to(stage).as_posix()] = sha256_file(path)
        written.append(manifest)
    return written[::-1]


def _around(
    planned: PlannedExport, stage: Path, notify: Notify
) -> tuple[LatentSpec, tuple[ConditionSpec, ...], Components]:
    """What stands around the denoiser, its graphs written into ``stage``."""
    from dipgo_deploy.export.components import export_components

    options, shape = planned.options, planned.traced.shape
    latent = LatentSpec(
        channels=planned.source.family.latent_channels(planned.source.config),
        frames=shape.frames,
        height=shape.height,
        width=shape.width,
        scale=planned.source.scale,
        time_scale=planned.source.time_scale,
        fps=planned.source.family.fps,
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
            encoder=planned.image is not None or any(spec.picture.form == "latents" for spec in conditions),
            embeds=next((spec for spec in conditions if spec.picture.form in ("embeds", "states")), None),
            float32=planned.source.family.float32_in_fp16 if options.dtype == "fp16" else (),
        )
    return latent, conditions, components


def _self_test_recorder(planned: PlannedExport, bundle: Bundle, note: Notify) -> SelfTestRecorder | None:
    """What records the test that the directory carries; None, and where nobody asked for none a line, where there will
    be none. Raises UserError where it was asked for and is too large."""
    from dipgo_deploy.compare.self_test import SelfTestRecorder

    options, manifest = planned.options, bundle.manifest
    if options.self_test is False:
        return None
    if options.low_memory and options.dtype == "bf16" and options.self_test is None:
        note(
            "no self-test: bf16 graphs are not compared here, and the model would run for it alone; --self-test does it"
        )
        return None
    if not options.check and options.self_test is None:
        note("no self-test: it is recorded with the comparison; --self-test records it without")
        return None
    limit = MOST_BYTES if options.self_test else SMALL_BYTES
    # Where weights are held once, the model's loop runs no further than the comparison of the graphs needs.
    recorder = SelfTestRecorder(bundle.at(manifest.usual_sizes), limit, whole=not options.low_memory)
    if recorder.needed <= limit:
        return recorder
    needed = f"a loop's conditions and latents take {recorder.needed / 2**20:.1f} MiB, more than {limit / 2**20:.0f}"
    if options.self_test:
        raise UserError(f"--self-test: {needed}; leave it out")
    note(f"no self-test: {needed}; --self-test records up to {MOST_BYTES / 2**20:.0f}")
    return None


def _write_self_test(planned: PlannedExport, bundle: Bundle, recorder: SelfTestRecorder, notify: Notify) -> None:
    """The file, where the comparison has not written it."""
    if planned.options.low_memory:
        _record_in_process(planned, bundle, recorder, notify)
    else:
        _write_recorded(planned, bundle, recorder, notify)


def _record_in_process(planned: PlannedExport, bundle: Bundle, recorder: SelfTestRecorder, notify: Notify) -> None:
    from dipgo_deploy.compare.processes import record_in_process

    if not (bundle.path / self_test_file(bundle.manifest)).is_file():
        notify("recording a self-test")
        record_in_process(bundle.path, planned.source.name, recorder.limit, bundle.manifest.name or None)


def _write_recorded(planned: PlannedExport, bundle: Bundle, recorder: SelfTestRecorder, notify: Notify) -> None:
    """The file, of what was recorded with the comparison, else by itself."""
    from dipgo_deploy.compare.self_test import record_alone
    from dipgo_deploy.reference.load import reference_of

    if recorder.test is None:
        notify("recording a self-test")
        source = _in_float32(planned.source, planned.options)
        usual = bundle.at(bundle.manifest.usual_sizes)
        tolerance = source.family.tolerance(planned.options.dtype, planned.options.quantize)
        record_alone(usual, reference_of(usual, source), tolerance, recorder)
    assert recorder.test is not None
    write_self_test(bundle.path / self_test_file(bundle.manifest), recorder.test)


def _release(planned: PlannedExport) -> None:
    """Drop the weights of a planned export whose graphs are written; it cannot be written again."""
    for value in planned.traced.model.graph.initializers.values():
        value.const_value = None
    for part in planned.traced.parts:
        part.release()
    planned.source.denoiser.to("meta")


def _check(
    planned: PlannedExport, bundle: Bundle, notify: Notify, note: Notify, recorder: SelfTestRecorder | None
) -> Agreement | None:
    """Compare the written directory with the model; how far the denoiser agrees, None for bf16 graphs, which ONNX
    Runtime's CPU provider cannot run."""
    from dipgo_deploy.compare.processes import verify_in_processes
    from dipgo_deploy.compare.written import verify_written

    if planned.options.dtype == "bf16":
        note("nothing was compared: bf16 graphs do not run on a CPU; dipgo-compare does it on a GPU")
        return None
    if not planned.options.low_memory:
        return verify_written(bundle, _in_float32(planned.source, planned.options), notify, note, recorder)
    notify(f"comparing the {planned.layout} with the supernet")
    limit = None if recorder is None else recorder.limit
    agreement = verify_in_processes(bundle.path, planned.source.name, limit, bundle.manifest.name or None)
    note("not compared at this size: the loop, the weights' values, text encoder and VAE; dipgo-compare does it")
    return agreement


def _in_float32(source: Source, options: ExportOptions) -> Source:
    """The model as it was loaded; in half precision the exporter has converted what is beside the denoiser."""
    from dipgo_deploy.supernet.load import load_pipeline

    if options.dtype == "fp32" or not options.components or source.pipeline is None:
        return source
    return replace(source, pipeline=load_pipeline(source.name, **source.family.parts(source.denoiser)))


class WrittenGraphs(NamedTuple):
    """What manifests say of the graphs: those of each export, the prologue's, and what is in fewer bits."""

    entries: list[tuple[VariantEntry, ...]]
    prologue: Graph | None
    quantization: QuantizationEntry | None


def write_entries(exports: Sequence[PlannedExport], folder: Path) -> WrittenGraphs:
    """Cut every variant or segment, write the graphs into ``folder``, and say for the manifests what they are.

    What several exports would cut alike is one graph, with the name that the first of them gives it.
    """
    graphs: dict[str, ir.Model] = {}
    known: dict[Hashable, VariantEntry] = {}
    found = []
    for export in exports:
        prefix = "" if export is exports[0] else f"{export.name}."
        for unit in export.units:
            alike = export.alike(unit)
            if alike not in known:
                named = replace(unit, name=f"{prefix}{unit.name}")
                graphs[named.name], known[alike] = _cut(export, named)
        found.append(tuple(known[export.alike(unit)] for unit in export.units))
    return WrittenGraphs(found, *_write(exports[0], list(graphs.values()), folder))


def _cut(planned: PlannedExport, unit: Variant | Segment) -> tuple[ir.Model, VariantEntry]:
    """The graph of a variant or segment, and its entry, which holds as soon as the graph is written."""
    traced, file = planned.traced, f"{GRAPHS}/{unit.name}.onnx"
    if isinstance(unit, Segment):
        graph = cut_segment(traced, unit, planned.history)
        reads, writes = reads_of(unit), writes_of(unit)
    else:
        graph = cut_variant(traced, unit, planned.history)
        reads = HALVES if unit.guides else tuple(cache_input(*cache_key(cache)) for cache in unit.reads)
        writes = tuple(cache_output(cache.kind, cache.value) for cache in unit.writes)
    entry = VariantEntry(
        name=unit.name,
        graph=graph_entry(graph, file, traced.shape.sizes),
        reads=reads,
        writes=writes,
        predicts=unit.predicts,
        macs=unit.macs,
    )
    return graph, entry


def _write(
    planned: PlannedExport, graphs: list[ir.Model], folder: Path
) -> tuple[Graph | None, QuantizationEntry | None]:
    """Write graphs with their weights, the prologue's among them, and tables; what the manifest says of that one, and
    of weights in fewer bits."""
    traced, timesteps = planned.traced, planned.table_timesteps
    rows = {} if traced.tables is None else traced.tables.rows(timesteps)
    prologue = None if traced.prologue is None else traced.prologue.graph(timesteps, rows)
    atexport = [made for made in (traced.tables, traced.classes) if made is not None]
    tabled = [parameter for made in atexport for parameter in made.part.parameters]
    every = [*graphs, *([] if prologue is None else [prologue])]
    method = planned.options.quantize
    # For ranges of activations the graphs are needed in floats first.
    quantization = None if method is None or method in ACTIVATIONS else quantize_weights(every, method)
    write_graphs(every, folder, tabled)
    if traced.classes is not None:
        rows |= traced.classes.rows(timesteps, rows)
    used = {str(value.name) for graph in graphs for value in graph.graph.inputs}
    types = {str(value.name): value.dtype for made in atexport for value in made.part.model.graph.outputs}
    stored = {name: table for name, table in rows.items() if name in used}
    if stored:
        write_tables(stored, types, folder)
    if prologue is None:
        return None, quantization
    return graph_entry(prologue, f"{GRAPHS}/{PROLOGUE_NAME}.onnx", traced.shape.sizes), quantization


def write_tables(rows: Mapping[str, np.ndarray], types: Mapping[str, Any], folder: Path) -> None:
    """Write the tables (float32, by name) in their types of the graphs."""
    import torch
    from onnx_ir.tensor_adapters import to_torch_dtype
    from safetensors.torch import save

    tensors = {
        name: torch.from_numpy(table).to(to_torch_dtype(types[name])).contiguous() for name, table in rows.items()
    }
    # Not save_file: what that writes only its owner can read.
    (folder / TABLES_NAME).write_bytes(save(tensors))


def _manifest(
    planned: PlannedExport,
    name: str,
    plan: PlanEntry,
    quantization: QuantizationEntry | None,
    latent: LatentSpec,
    conditions: tuple[ConditionSpec, ...],
    components: Components,
) -> Manifest:
    """Without the digests of its files."""
    source, schedule, options, traced = planned.source, planned.schedule, planned.options, planned.traced
    scaled = traced.shape.guidance or any(spec.source == "guidance" for spec in conditions)
    folder = f"{SCHEDULES}/{planned.name}/" if planned.name and not planned.others else ""
    return Manifest(
        created_by=f"dipgo_deploy {__version__}",
        model=ModelEntry(
            class_name=source.family.class_name,
            name=name,
            config_hash=source.config_hash,
            granularity=schedule.model.granularity,
            config={key: value for key, value in source.config.items() if not key.startswith("_")},
            denoisers=tuple(filter(None, source.family.denoisers)),
        ),
        schedule=f"{folder}{SCHEDULE_NAME}",
        name=planned.name,
        others={name: f"{SCHEDULES}/{name}/{MANIFEST_NAME}" for name in planned.others},
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
        guidance_off=source.family.guide.off,
        latent=latent,
        sizes=traced.shape.sizes,
        conditions=conditions,
        plan=plan,
        quantization=quantization,
        components=components,
        tools={name: importlib.metadata.version(name) for name in _TOOLS},
        files={},
    )


def _conditions(planned: PlannedExport) -> tuple[ConditionSpec, ...]:
    return open_conditions(planned.source, planned.traced.shape.whole, planned.options.dtype)


def _plan_entry(planned: PlannedExport, variants: tuple[VariantEntry, ...], prologue: Graph | None) -> PlanEntry:
    plan, matrix, columns = planned.plan, planned.matrix, planned.columns
    laid_out = planned.segments or plan
    numbers = denoiser_numbers(planned.source.family, planned.schedule)
    guidance = planned.schedule.guidance
    with_history = {
        place for place, entry in enumerate(variants) if HISTORY in {spec.name for spec in entry.graph.inputs}
    }

    def weights(row: np.ndarray) -> tuple[float, ...]:
        found = row[list(columns)].tolist()
        return (*found[: planned.chain], *[0.0] * planned.spare, *found[planned.chain :])

    return PlanEntry(
        layout=planned.layout,
        variants=variants,
        launches=tuple(
            LaunchEntry(
                step=launch.step,
                variant=launch.variant,
                timestep=float(matrix.timesteps[launch.step]),
                coefficients=weights(matrix.rows[launch.step]) if launch.variant in with_history else (),
                reads=launch.reads,
                writes=launch.writes,
                slot=None if launch.prediction is None else columns.index(1 + launch.prediction),
                forecast=launch.weights,
                denoiser=numbers[launch.step],
                guidance=1.0 if guidance is None else guidance[launch.step],
                half=launch.half,
                passes=launch.passes,
            )
            for launch in laid_out.launches
        ),
        final=weights(matrix.final),
        slots=planned.history.slots,
        noises=matrix.noises,
        spare=planned.spare,
        image_slot=planned.history.chain if matrix.image else None,
        table_timesteps=planned.table_timesteps,
        table_classes=() if planned.traced.classes is None else planned.traced.classes.classes,
        prologue=prologue,
        arena_bytes=laid_out.arena_bytes,
        lower_bound_bytes=laid_out.lower_bound_bytes,
        macs_full=plan.macs_full,
        macs_schedule=plan.macs_schedule,
        macs_run=laid_out.macs_run,
        evaluations=len(plan.keep),
    )
