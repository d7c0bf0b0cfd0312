"""What every model family has to show, whatever its architecture: see ``check_family``."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dipgo_deploy.backends import create_backend
from dipgo_deploy.bundle.directory import Bundle, reseal
from dipgo_deploy.bundle.prologue import PROLOGUE_NAME
from dipgo_deploy.bundle.shapes import Sizes
from dipgo_deploy.compare.engine import Options, compare_engine
from dipgo_deploy.compare.pictures import cases
from dipgo_deploy.compare.report import Report
from dipgo_deploy.compare.stock import Case, StockPipeline
from dipgo_deploy.compare.worst import Seen, nobody
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, in_layout, plan_export, publish, replan
from dipgo_deploy.integrations.diffusers import load_engines
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.reference.load import Reference, load_reference
from dipgo_deploy.schedule import builders
from dipgo_deploy.schedule.document import CacheKind, Granularity, Schedule

torch.set_num_threads(1)


def random_weights(model: Any, scale: float = 0.05, seed: int = 0) -> Any:
    """The model with noise on every parameter: initial zeros and equal values would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def schedule_for(
    model: Path | str,
    *,
    ratio: float = 0.0,
    sampler: str | None = None,
    steps: int = 4,
    granularity: Granularity = "block",
    cache: CacheKind | None = None,
    seed: int = 0,
) -> Schedule:
    """A schedule that removes a random ``ratio`` of the gates (0: a full run); sampler None: the model's own."""
    target = schedule_target(str(model), sampler, steps, granularity, cache)
    if ratio == 0:
        return target.schedule(target.gates(builders.full), "full", {})
    gates = target.gates(lambda evaluations, blocks: builders.random(evaluations, blocks, ratio, seed))
    return target.schedule(gates, "random", {"ratio": ratio, "seed": seed})


def plan_for(model: Path | str, schedule: Schedule, **options: Any) -> PlannedExport:
    """One trace of the model; ``replan`` gives it other gates of the same blocks."""
    return plan_export(str(model), schedule, ExportOptions(**{"layout": "variants", **options}))


def loop_report(
    engine_dir: Path,
    prompt: str = "a red shoe",
    label: int = 1,
    variants: bool = True,
    sizes: Sizes | None = None,
    pictures: bool = False,
    guidance_scale: float | None = None,
    reference: Reference | None = None,
    seen: Seen = nobody,
) -> Report:
    """The whole loop of an engine directory, and every variant, against the torch supernet, on ONNX Runtime's CPU.

    sizes: of those that it leaves open; the largest batch and the usual height and width by default. pictures: also
    tokens, conditions and pictures of the cases that the comparison makes, against the stock pipeline. guidance_scale:
    of the first case, the directory's default by default. reference: the model, where it is loaded already. seen: is
    shown every picture.
    """
    bundle = Bundle.open(engine_dir) if sizes is None else Bundle.open(engine_dir).at(sizes)
    manifest = bundle.manifest
    reference = reference or load_reference(bundle)
    inputs = reference.inputs(manifest, guidance_scale=manifest.guidance_scale, prompts=(prompt,), labels=(label,))
    chosen = tuple(cases(manifest, guidance_scale=guidance_scale)) if pictures else ()
    options = Options(variants=variants, pictures=pictures, cases=chosen, seen=seen)
    return compare_engine(bundle, reference, inputs, create_backend("cpu", threads=1), options)


def assert_pictures_equal_stock(
    engine_dir: Path,
    components: Path | None = None,
    sizes: Sizes | None = None,
    *,
    variants: bool = False,
    guidance_scale: float | None = None,
) -> None:
    """Tokens, conditions, loop and pictures are those of the stock pipeline with the supernet as its denoiser, and so
    are those of the stock pipeline with the engines in it.

    components: an engine directory to take them from, for one that was exported without. variants: each by itself, too.
    """
    if components is not None:
        borrow_components(components, engine_dir)
    drawn: dict[str, np.ndarray] = {}
    bundle = Bundle.open(engine_dir) if sizes is None else Bundle.open(engine_dir).at(sizes)
    reference = load_reference(bundle)
    report = loop_report(
        engine_dir,
        variants=variants,
        sizes=sizes,
        pictures=True,
        guidance_scale=guidance_scale,
        reference=reference,
        seen=lambda name, ours, theirs: drawn.update({name: theirs}),
    )
    failure = report.first_failure()
    assert failure is None, failure
    assert report.pictures and report.skipped == (), report.skipped
    for part in report.pictures:
        for tensor in part.tensors:
            assert tensor.relative <= 1e-4, f"{part.place}, {tensor.name}: {tensor.relative}"
    case = cases(bundle.manifest, guidance_scale=guidance_scale)[0]
    wanted = np.stack([drawn[f"{case.name}, {place}"] for place in case.places])
    assert_engines_in_stock_draw(bundle, reference, case, wanted)


def assert_engines_in_stock_draw(
    bundle: Bundle, reference: Reference, case: Case, wanted: np.ndarray | None = None
) -> None:
    """The stock pipeline with the engines in it draws what it draws with the supernet (wanted, where it is known)."""
    stock = StockPipeline(bundle.manifest, reference)
    case = stock.possible(case)
    wanted = stock(case).images if wanted is None else wanted
    with load_engines(stock.pipeline, bundle.path, "cpu", threads=1):
        found = stock.as_it_is(case).images
    assert found is not None and wanted is not None and found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-4, case.name


def check_family(
    model: Path | str, folder: Path, *, steps: int = 4, ratio: float = 0.5, tolerance: float = 1e-4, **choices: Any
) -> Bundle:
    """Export a random schedule without components and hold every tensor to ``tolerance`` of the supernet's.

    choices: ``sampler``, ``granularity``, ``cache``, ``seed`` of ``schedule_for``. Returns the bundle for further
    looks (number of variants, engine builds).
    """
    schedule = schedule_for(model, ratio=ratio, steps=steps, **choices)
    planned = plan_for(model, schedule, components=False)
    bundle = publish(planned, folder)
    assert any(variant.reads for variant in bundle.manifest.plan.variants)  # something was skipped
    report = loop_report(folder)
    assert report.first_failure() is None
    assert report.results is not None
    for tensor in (*(tensor for step in report.loop for tensor in step.tensors), *report.results.tensors):
        assert tensor.relative <= tolerance, f"{tensor.name}: {tensor.relative}"
    return bundle


def check_guidance(model: Path | str, folder: Path, *, pictures: bool = False, **options: Any) -> Bundle:
    """Export a random schedule with conditional-only evaluations and a share in both layouts and hold every tensor to
    the supernet's; pictures: also to the stock pipeline's. options: of the export, but ``steps``, 4 by default."""
    steps = options.pop("steps", 4)
    schedule = schedule_for(model, steps=steps, ratio=0.4, seed=1)
    shares = [(1.0, 0.0, 0.5, 0.0)[step % 4] for step in range(schedule.steps)]
    schedule, _ = builders.with_guidance(schedule, shares, {})
    planned = plan_for(model, schedule, check=False, components=pictures, **options)
    for layout in ("segments", "variants"):
        bundle = publish(in_layout(planned, layout), folder / layout)
        assert [launch.guidance for launch in bundle.manifest.plan.launches].count(0)
        report = loop_report(bundle.path, pictures=pictures)
        assert report.first_failure() is None, report.first_failure()
    return bundle


def with_gates(planned: PlannedExport, schedule: Schedule, folder: Path, **changes: Any) -> Bundle:
    """The trace of ``planned`` cut for another schedule, written to ``folder``."""
    return publish(replan(replace(planned, options=replace(planned.options, **changes)), schedule), folder)


def with_strength(planned: PlannedExport, strength: float) -> PlannedExport:
    """The same trace for another share of the steps; for ``with_gates``."""
    return replace(planned, options=replace(planned.options, strength=strength))


def borrow_components(source: Path, target: Path) -> None:
    """Give an engine directory that was exported without components those of another: they know no schedule."""
    theirs = json.loads((source / "manifest.json").read_text())
    ours = json.loads((target / "manifest.json").read_text())
    borrowed = {
        file: digest
        for file, digest in theirs["files"].items()
        if file.startswith(("components/", "tokenizer")) and file not in ours["files"]
    }
    for name in {file.partition("/")[0] for file in borrowed}:
        shutil.copytree(source / name, target / name)
    ours["components"] = theirs["components"]
    ours["files"] |= borrowed
    (target / "manifest.json").write_text(json.dumps(ours))
    reseal(target)


def build_with_tensorrt_rtx(engine_dir: Path) -> int:
    """Engines of every variant and component, built without a GPU; returns their number, without the prologue's, which
    small models have by chance. Skips without the package."""
    import pytest

    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: engines cannot be built here")
    from dipgo_deploy.engine.build import build_engines

    built = [engine.name for engine in build_engines(engine_dir, "tensorrt-rtx").built]
    has_prologue = Bundle.open(engine_dir).manifest.plan.prologue is not None
    assert (PROLOGUE_NAME in built) == has_prologue
    return len(built) - has_prologue
