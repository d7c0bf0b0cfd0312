"""What every family of videos has to show beside ``family_checks``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from family_checks import (
    assert_pictures_equal_stock,
    build_with_tensorrt_rtx,
    loop_report,
    plan_for,
    random_weights,
    schedule_for,
    with_gates,
)
from sd_pipelines import relative

from dipgo_deploy.compare.stock import prompts_as_they_are
from dipgo_deploy.export.exporter import PlannedExport, publish, replan
from dipgo_deploy.models import family_for
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.sampler import make_scheduler
from dipgo_deploy.schedule import builders

SEED, STEPS = 3, 4


def wan_vae(**changes: Any) -> AutoencoderKLWan:
    """Two levels, of which one lengthens time."""
    settings: dict[str, Any] = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1],
        "num_res_blocks": 0,
        "temperal_downsample": [True],
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.5, 0.7, 1.0, 2.0],
        "scale_factor_temporal": 2,
        "scale_factor_spatial": 2,
    }
    torch.manual_seed(0)
    return random_weights(AutoencoderKLWan(**{**settings, **changes}))


@dataclass(frozen=True)
class Exported:
    """A model, the trace of it, and the engine directory of the full schedule of its own sampler, with components."""

    model: str
    planned: PlannedExport
    engine: Path


def exported(model: str | Path, folder: Path, size: Mapping[str, int], steps: int = STEPS) -> Exported:
    planned = plan_for(model, schedule_for(model, steps=steps), check=False, **size)
    return Exported(str(model), planned, publish(planned, folder).path)


def ours(engine_dir: Path, **call: Any) -> np.ndarray:
    """Latents (n, C, f, h, w) or frames (n, F, H, W, 3) of an engine directory."""
    pipeline = Pipeline.from_engine_dir(engine_dir, "cpu", threads=1)
    return np.asarray(pipeline(seed=SEED, **call).images)


def theirs(pipeline: Any, *, sampler: str | None = None, **call: Any) -> np.ndarray:
    """The same of a stock pipeline, its latents as it has them."""
    own = pipeline.scheduler
    if sampler is not None:
        pipeline.scheduler = make_scheduler(sampler, own.config)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    try:
        with torch.no_grad(), prompts_as_they_are(pipeline):
            frames = pipeline(num_inference_steps=STEPS, generator=generator, **call).frames
    finally:
        pipeline.scheduler = own
    return np.asarray(frames, np.float32)


def check_random_blocks(model: str | Path, planned: PlannedExport, engine: Path, folder: Path) -> None:
    """Half of the blocks, with residuals, are the supernet; so are tokens, conditions and videos, beside the stock
    pipeline with the supernet in it. engine: where components are borrowed from."""
    assert {block.cache for block in planned.schedule.blocks} == {"residual"}
    half = with_gates(planned, schedule_for(model, ratio=0.5, steps=STEPS), folder, components=False)
    assert len(half.manifest.plan.variants) > 1
    assert loop_report(half.path).first_failure() is None
    assert_pictures_equal_stock(half.path, engine)


def check_samplers(
    stock: Any,
    model: Path,
    planned: PlannedExport,
    folder: Path,
    samplers: tuple[str, ...],
    embeds: Mapping[str, Any],
    call: Mapping[str, Any],
    unpacked: Callable[[np.ndarray], np.ndarray] = lambda latents: latents,
) -> None:
    """The full schedule of other samplers gives the stock pipeline's latents.

    embeds: of the prompt in ``call``. unpacked: the pipeline's latents as (n, C, f, h, w).
    """
    for sampler in samplers:
        schedule = schedule_for(model, steps=STEPS, sampler=sampler)
        other = with_gates(planned, schedule, folder / sampler, components=False)
        got = ours(other.path, **embeds, output_type="latent")
        assert relative(got, unpacked(theirs(stock, sampler=sampler, output_type="latent", **call))) < 1e-4


def check_whole_evaluations_skipped(model: Path, planned: PlannedExport, folder: Path) -> None:
    """Every second evaluation skips every block, as MagCache and TeaCache do where the choice is made beforehand."""
    target = schedule_target(str(model), None, STEPS)
    schedule = target.schedule(builders.uniform(target.steps, len(target.blocks), 2), "interval", {"interval": 2})
    bundle = with_gates(planned, schedule, folder, components=False)
    assert [sum(map(int, row)) for row in schedule.gates] == [len(target.blocks), 0] * 2
    assert len(bundle.manifest.plan.variants) == 2
    assert loop_report(bundle.path).first_failure() is None


def check_layers_in_both_layouts(model: Path, folder: Path, size: Mapping[str, int]) -> None:
    """A random schedule of layers is the supernet in variants and in segments, of one trace."""
    schedule = schedule_for(model, ratio=0.5, steps=STEPS, granularity="layer")
    planned = plan_for(model, schedule, components=False, check=False, **size)
    segments = replan(replace(planned, options=replace(planned.options, layout="segments")), schedule)
    for layout, plan in (("variants", planned), ("segments", segments)):
        bundle = publish(plan, folder / layout)
        assert bundle.manifest.plan.layout == layout
        report = loop_report(bundle.path)
        assert report.first_failure() is None and report.results is not None
        for tensor in (*(tensor for step in report.loop for tensor in step.tensors), *report.results.tensors):
            assert tensor.relative <= 1e-4, f"{tensor.name}: {tensor.relative}"


def check_half_precision(model: Path, folder: Path, dtype: str, size: Mapping[str, int], steps: int = 2) -> None:
    """fp16 is as close as the family allows (the export compares it; a CPU does not run bf16), and builds."""
    schedule = schedule_for(model, ratio=0.5, steps=steps, granularity="layer")
    bundle = publish(plan_for(model, schedule, dtype=dtype, components=False, **size), folder)
    assert build_with_tensorrt_rtx(bundle.path) == len(bundle.manifest.plan.variants)


def check_blocks(entry: Mapping[str, Any], denoiser_class: Any, outside: tuple[str, ...], **units: int) -> None:
    """The published configuration has so many units of each granularity, which are real modules and leave only these
    parameters out. entry: of ``tools.full_size``."""
    config = entry["config"]
    family = family_for(entry["class_name"])
    with torch.device("meta"):
        denoiser = denoiser_class(**{key: value for key, value in config.items() if not key.startswith("_")})
    for granularity, count in units.items():
        specs = family.blocks(config, granularity)  # type: ignore[arg-type]
        assert len(specs) == count == len({spec.name for spec in specs})
        assert all(denoiser.get_submodule(path) for spec in specs for path in spec.modules)
    covered = tuple(f"{module}." for spec in family.blocks(config, "block") for module in spec.modules)
    left = [name for name, _ in denoiser.named_parameters() if not name.startswith(covered)]
    assert all(name.startswith(outside) for name in left)
