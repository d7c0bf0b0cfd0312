"""What is in an engine directory, as plain values: from the manifest, the schedule and the files alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dipgo_deploy.backends.tensorrt_plans import (
    PLAN_SUFFIX,
    PLANS,
    RECORD_SUFFIX,
    PlanRecord,
    WeightHashes,
    graph_of_plan,
    plan_name,
    profile_of,
)
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Graph, Manifest, TensorSpec
from dipgo_deploy.bundle.prologue import run_row_bytes
from dipgo_deploy.bundle.stored import stored_values
from dipgo_deploy.bundle.tables import TABLES_NAME
from dipgo_deploy.bundle.weights import WEIGHTS_INDEX, WEIGHTS_NAME, WeightsIndex, weights_of
from dipgo_deploy.engine.budget import memory_need
from dipgo_deploy.schedule.summary import schedule_facts, span


def contents(bundle: Bundle, *, verify: bool = False) -> dict[str, Any]:
    """All of an engine directory, for JSON. Sizes are in bytes, those of open sizes the largest.

    Of a directory with several schedules it is that of one, and ``schedules`` says of each its name, evaluations that
    are launched, and graphs. ``engines`` and ``files`` are always the whole directory's.

    ``model``, ``sampler``, ``latent`` (without the batch), ``conditions`` and ``components``: as the manifest has them.
    ``schedule``: see ``schedule_facts``. ``variants``: each with the evaluations it runs at and the caches it reads and
    writes. ``graphs``: of variants, of the prologue, then of components, with inputs, outputs and weights (None where
    the directory is older than the index of weights). ``caches``: by name, each value of one with its offset, the
    launch that writes it and those that read it. ``launches``: in order. ``memory``: ``weights`` as stored,
    ``weights_of_graphs`` where each graph has its own, ``arena`` with ``arena_least`` that no allocation goes below,
    ``history``, ``tables``, ``run_rows`` that are made at the start of a run, ``other`` (see ``MemoryNeed``).
    ``quantization``: what is in fewer bits, None where nothing is. ``table_classes``: that alone can be drawn; none:
    all. ``engines``: see ``engines``. ``tools``: versions that made it. ``files``: sha256 by path.

    verify: also compare the engines with the weights that are here, and with their own sha256, which reads all of
    them; else by graph, shapes and size of the file.

    Raises:
        UserError: a schedule, a graph or an index of weights that cannot be read.
    """
    manifest = bundle.manifest
    every = list(bundle.with_each())
    graphs = [_graph(bundle.path, graph) for graph in _graphs(manifest)]
    latent, sizes = manifest.latent, manifest.sizes
    return {
        "engine_dir": str(bundle.path),
        "format_version": manifest.format_version,
        "created_by": manifest.created_by,
        "model": manifest.model.model_dump(mode="json"),
        "dtype": manifest.dtype,
        "quantization": None if manifest.quantization is None else manifest.quantization.model_dump(mode="json"),
        "batch": manifest.batch,
        "latent": list(latent.shape),
        "scale": latent.scale,
        "video_frames": latent.video_frames,
        "sizes": None if sizes is None else sizes.model_dump(mode="json"),
        "guidance": manifest.guidance,
        "guidance_scale": manifest.guidance_scale,
        "guidance_batch": manifest.guidance_batch if manifest.guidance else None,
        "sampler": manifest.sampler.model_dump(mode="json"),
        "schedules": [
            {
                "name": one.manifest.name,
                "launches": len(one.manifest.plan.launched),
                "graphs": [variant.graph.file for variant in one.manifest.plan.variants],
            }
            for one in every
            if one.manifest.name
        ],
        "name": manifest.name or None,
        "schedule": schedule_facts(bundle.load_schedule()),
        "promoted": [{"step": step, "block": block} for step, block in manifest.promoted],
        "layout": manifest.plan.layout,
        "evaluations": manifest.plan.evaluations,
        "macs": {name: getattr(manifest.plan, f"macs_{name}") for name in ("full", "schedule", "run")},
        "conditions": [spec.model_dump(mode="json") for spec in manifest.conditions],
        "components": _components(manifest),
        "table_classes": list(manifest.plan.table_classes),
        "variants": _variants(manifest),
        "graphs": graphs,
        "caches": _caches(manifest),
        "launches": _launches(manifest),
        "memory": _memory(bundle, graphs),
        "engines": list(engines(bundle, verify=verify)),
        "tools": dict(manifest.tools),
        "files": dict(every[0].manifest.files),
    }


def lifetimes(values: Sequence[Mapping[str, Any]]) -> str:
    """Launches at which the values of a cache of ``contents`` are alive: ``0-4, 5-9``; one that nobody reads, ``3``."""
    return ", ".join(span(value["written"], max((value["written"], *value["read"]))) for value in values)


def _graphs(manifest: Manifest) -> Iterator[Graph]:
    yield from manifest.plan.graphs
    yield from manifest.components.graphs


def _spec(spec: TensorSpec) -> dict[str, Any]:
    open_shape = {} if spec.dims is None else {"dims": list(spec.dims)}
    return {"name": spec.name, "shape": list(spec.shape), **open_shape, "dtype": spec.dtype}


def _components(manifest: Manifest) -> dict[str, Any]:
    """All that is said of them but their graphs."""
    found = manifest.components.model_dump(
        mode="json",
        exclude={"vae_decoder", "vae_following", "vae_encoder", "vae_encoder_following", "image_encoder"},
    )
    if found["text_encoder"] is not None:
        del found["text_encoder"]["graph"]
    return found


def _graph(engine_dir: Path, graph: Graph) -> dict[str, Any]:
    path = engine_dir / graph.file
    known = (path.parent / WEIGHTS_INDEX).is_file()
    weights = weights_of(path, WeightsIndex.load(path.parent)).values() if known else None
    return {
        "name": plan_name(graph),
        "file": graph.file,
        "bytes": path.stat().st_size,
        "inputs": [_spec(spec) for spec in graph.inputs],
        "outputs": [_spec(spec) for spec in graph.outputs],
        "weights": None if weights is None else len(weights),
        "weight_bytes": None if weights is None else sum(stored.length for stored in weights),
    }


def _variants(manifest: Manifest) -> list[dict[str, Any]]:
    plan = manifest.plan
    rows = []
    for place, variant in enumerate(plan.variants):
        steps = [launch.step for launch in plan.launches if launch.variant == place]
        inputs = {spec.name: spec.nbytes for spec in variant.graph.inputs}
        outputs = {spec.name: spec.nbytes for spec in variant.graph.outputs}
        rows.append(
            {
                "name": variant.name,
                "graph": variant.graph.file,
                "launches": len(steps),
                "steps": sorted(set(steps)),
                "predicts": variant.predicts,
                "macs": variant.macs,
                "reads": list(variant.reads),
                "read_bytes": sum(inputs[name] for name in variant.reads),
                "writes": list(variant.writes),
                "write_bytes": sum(outputs[name] for name in variant.writes),
            }
        )
    return rows


def _caches(manifest: Manifest) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for value in stored_values(manifest.plan):
        spec = value.spec
        row = found.setdefault(
            value.name,
            {
                "name": value.name,
                "shape": list(spec.shape),
                "dtype": spec.dtype,
                "bytes": spec.nbytes,
                "values": [],
            },
        )
        row["values"].append({"offset": value.offset, "written": value.written, "read": list(value.read)})
    return [found[name] for name in sorted(found)]


def _launches(manifest: Manifest) -> list[dict[str, Any]]:
    plan = manifest.plan
    return [
        {
            "launch": number,
            "step": launch.step,
            "variant": plan.variants[launch.variant].name,
            "timestep": launch.timestep,
            "reads": dict(zip(plan.variants[launch.variant].reads, launch.reads, strict=True)),
            "writes": dict(zip(plan.variants[launch.variant].writes, launch.writes, strict=True)),
            "slot": launch.slot,
            "coefficients": list(launch.coefficients),
            "forecast": list(launch.forecast),
            **({"denoiser": manifest.model.denoisers[launch.denoiser]} if manifest.model.denoisers else {}),
            **({} if launch.guidance == 1 else {"guidance": launch.guidance}),
            **({} if launch.half is None else {"half": launch.half}),
            **({} if launch.passes is None else {"passes": launch.passes}),
        }
        for number, launch in enumerate(plan.launches)
    ]


def _memory(bundle: Bundle, graphs: list[dict[str, Any]]) -> dict[str, Any]:
    manifest, path = bundle.manifest, bundle.path
    folders = sorted({(path / graph["file"]).parent for graph in graphs})
    stored = [folder / WEIGHTS_NAME for folder in folders if (folder / WEIGHTS_NAME).is_file()]
    of_graphs = [graph["weight_bytes"] for graph in graphs]
    tables = (path / manifest.plan.variants[0].graph.file).parent / TABLES_NAME
    need = memory_need(manifest, {})
    return {
        "weights": sum(file.stat().st_size for file in stored),
        "weights_of_graphs": None if None in of_graphs else sum(of_graphs),
        "arena": need.arena,
        "arena_least": manifest.plan.lower_bound_bytes,
        "history": need.history,
        "tables": tables.stat().st_size if tables.is_file() else 0,
        "run_rows": run_row_bytes(manifest.plan),
        "other": need.other,
    }


def engines(bundle: Bundle, *, verify: bool = False) -> Iterator[dict[str, Any]]:
    """Every TensorRT engine beside the graphs, and every file that should be one; ``problem`` says why one is not used
    (other than that it is for another version or GPU than are here), None for nothing found.

    verify: see ``contents``.

    Raises:
        UserError: weights that cannot be read.
    """
    plans = bundle.path / PLANS
    graphs = {
        plan_name(graph): (graph, one.manifest.files[graph.file])
        for one in bundle.with_each()
        for graph in _graphs(one.manifest)
    }
    hashes = WeightHashes()
    stems = {path.with_suffix("") for suffix in (PLAN_SUFFIX, RECORD_SUFFIX) for path in plans.glob(f"*/*{suffix}")}
    for stem in sorted(stems):
        plan, record = (
            stem.with_name(stem.name + PLAN_SUFFIX),
            PlanRecord.load(stem.with_name(stem.name + RECORD_SUFFIX)),
        )
        graph, digest = graphs.get(graph_of_plan(plan), (None, ""))
        facts: dict[str, Any] = {"name": stem.relative_to(plans).as_posix(), "graph": graph and graph.file}
        if record is not None:
            facts |= {
                "key": record.key,
                "built_from": record.inputs.model_dump(mode="json"),
                "bytes": record.plan_bytes,
                "weight_bytes": record.weights_bytes,
                "seconds": record.seconds,
            }
        yield {**facts, "problem": _problem(bundle.path, graph, digest, plan, record, hashes if verify else None)}


def _problem(
    engine_dir: Path,
    graph: Graph | None,
    digest: str,
    plan: Path,
    record: PlanRecord | None,
    hashes: WeightHashes | None,
) -> str | None:
    """Why an engine is not used. digest: of the graph. hashes: None leaves out what has to be read for it."""
    if record is None:
        return "has no record that can be read"
    if graph is None:
        return "no graph has its name"
    if not plan.is_file():
        return "the engine itself is missing"
    other = []
    if record.inputs.graph != digest:
        other.append("another graph")
    if hashes is not None and record.inputs.weights != hashes.digest(engine_dir / graph.file)[0]:
        other.append("other weights")
    if record.inputs.profile != profile_of(graph):
        other.append("other shapes")
    if other:
        return f"was built from {' and '.join(other)}"
    if plan.stat().st_size != record.plan_bytes or (hashes is not None and not record.intact(plan)):
        return "is damaged: its content is not the recorded one"
    return None
