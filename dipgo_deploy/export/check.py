"""Every variant against the supernet, on inputs recorded from a real loop, before an export counts as done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dipgo_deploy.bundle.manifest import VariantEntry
from dipgo_deploy.compare.metrics import relative_error
from dipgo_deploy.errors import ToleranceError

if TYPE_CHECKING:
    from dipgo_deploy.compare.recording import Recording
    from dipgo_deploy.export.exporter import PlannedExport


class _Names(NamedTuple):
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    predicts: bool


def record(planned: PlannedExport) -> list[Recording]:
    """Recordings of every variant, from the float32 supernet under the promoted schedule."""
    from dipgo_deploy.compare.conditions import reference_inputs
    from dipgo_deploy.compare.recording import Recorder, record_variants
    from dipgo_deploy.export.cut import cache_input, cache_output
    from dipgo_deploy.supernet.gated import Supernet

    source, shape = planned.source, planned.traced.shape
    specs = source.specs(planned.schedule)
    supernet = Supernet(source.denoiser, specs, [planned.schedule.cache_kinds[spec.name] for spec in specs])
    inputs = reference_inputs(
        source,
        planned.traced.conditions,
        (shape.batch, source.family.latent_channels(source.config), shape.height, shape.width),
        noises=planned.matrix.noises,
        guidance=shape.guidance,
    )
    variants = [
        _Names(tuple(map(cache_input, variant.reads)), tuple(map(cache_output, variant.writes)), variant.predicts)
        for variant in planned.plan.variants
    ]
    launches = [(launch.step, launch.variant) for launch in planned.plan.launches]
    return record_variants(
        Recorder(variants, launches, inputs.guidance_scale, planned.slots),
        supernet,
        planned.scheduler,
        planned.schedule.sampler.num_inference_steps,
        planned.plan.keep,
        inputs,
    )


def check_variants(planned: PlannedExport, variants: tuple[VariantEntry, ...], stage: Path) -> None:
    """Run each variant once on ONNX Runtime's CPU provider and compare it with its recording.

    bf16 graphs are not run: that provider has no bf16 kernels; they pass the checker only.

    Raises:
        ToleranceError: names variant, tensor and both errors.
    """
    if planned.options.dtype == "bf16":
        return
    tolerance = planned.source.family.tolerances[planned.options.dtype]
    for recording in record(planned):
        entry = variants[recording.variant]
        for name, actual in run_graph(stage / entry.graph.file, entry, recording.inputs).items():
            error = relative_error(actual, recording.outputs[name])
            if not error <= tolerance:
                raise ToleranceError(
                    f"variant {entry.name}, step {recording.step}, {name}: relative error {error:.2e} against the "
                    f"supernet, above {tolerance:g}; nothing was written"
                )


def run_graph(path: Path, entry: VariantEntry, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One run on ONNX Runtime's CPU provider; inputs are cast to the graph's dtypes, outputs come as float32."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {spec.name: inputs[spec.name].astype(spec.dtype) for spec in entry.graph.inputs}
    names = [spec.name for spec in entry.graph.outputs]
    return {name: value.astype(np.float32) for name, value in zip(names, session.run(names, feeds), strict=True)}
