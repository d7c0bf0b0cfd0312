"""The graphs of an engine directory made once more from its model: what they ought to be."""

from __future__ import annotations

from pathlib import Path

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.shapes import Range
from dipgo_deploy.bundle.tables import table_specs
from dipgo_deploy.export.options import ExportOptions
from dipgo_deploy.export.planning import Notify


def options_of(bundle: Bundle, dtype: str | None = None) -> ExportOptions:
    """How an engine directory was exported, without what surrounds its denoiser. dtype: another one."""
    manifest, plan = bundle.manifest, bundle.manifest.plan
    in_run = plan.prologue is not None or bool(plan.table_classes)
    usual, sizes = manifest.usual_sizes, manifest.sizes
    scale = manifest.latent.scale or 1
    graphs = len({launch.variant for launch in plan.launches if launch.half in plan.halves})
    calibration = None if manifest.quantization is None else manifest.quantization.calibration

    def extent(name: str, unit: int) -> int | Range:
        open_range = None if sizes is None else getattr(sizes, name)
        if open_range is None or open_range.is_static:
            return int(getattr(usual, name)) * unit
        return Range(
            min=open_range.min * unit,
            opt=open_range.opt * unit,
            max=open_range.max * unit,
            multiple=open_range.multiple * unit,
        )

    return ExportOptions(
        dtype=dtype or manifest.dtype,
        batch=extent("batch", 1),
        guidance=manifest.guidance,
        guidance_batch=manifest.guidance_batch,
        height=extent("height", scale),
        width=extent("width", scale),
        num_frames=manifest.latent.video_frames,
        # Gates that were re-enabled for this are in the schedule; the number makes the same variants of them.
        max_variants=graphs if manifest.promoted and plan.layout == "variants" else None,
        layout=manifest.plan.layout,
        strength=manifest.sampler.strength,
        allow_other_config=True,
        check=False,
        components=False,
        # Of a prologue or tables of classes they may be a part, and in no graph.
        timestep_tables=None if in_run else bool(table_specs(bundle)),
        prologue=plan.prologue is not None,
        class_labels=plan.table_classes,
        quantize=manifest.quantized,
        quantize_budget=None if calibration is None else calibration.budget,
        calibration_samples=ExportOptions.calibration_samples if calibration is None else calibration.samples,
        calibration_prompts=() if calibration is None else calibration.prompts,
        self_test=False,
    )


def exported_again(
    bundle: Bundle,
    folder: Path,
    model: str | None = None,
    dtype: str | None = None,
    notify: Notify = lambda stage: None,
) -> Bundle:
    """Export the model of an engine directory under its schedule into ``folder``, unchecked.

    model: where it is, None for the one that the manifest names. dtype: another one.

    Raises:
        UserError: as ``export_bundle``.
    """
    from dipgo_deploy.export.exporter import export_bundle

    name = bundle.manifest.model.name if model is None else model
    return export_bundle(name, bundle.load_schedule(), folder, options_of(bundle, dtype), notify, note=notify)
