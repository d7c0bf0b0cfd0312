"""Every graph against the supernet, on inputs recorded from a real loop, before an export counts as done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dipgo_deploy.bundle.manifest import PlanEntry, VariantEntry
from dipgo_deploy.bundle.shapes import Sizes
from dipgo_deploy.compare.metrics import Agreement, agreement, worst
from dipgo_deploy.errors import ToleranceError
from dipgo_deploy.export.conditions import corners

if TYPE_CHECKING:
    import onnxruntime

    from dipgo_deploy.compare.conditions import ReferenceInputs
    from dipgo_deploy.compare.recording import LoopRecorder, Recording
    from dipgo_deploy.compare.steps import StepRecording
    from dipgo_deploy.export.exporter import PlannedExport


class _Names(NamedTuple):
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    predicts: bool


def record(planned: PlannedExport, sizes: Sizes | None = None) -> list[Recording]:
    """Recordings of every variant, from the float32 supernet under the promoted schedule.

    sizes: where the export leaves them open.
    """
    from dipgo_deploy.compare.recording import Recorder
    from dipgo_deploy.export.cut import cache_input, cache_output

    inputs = _inputs(planned, sizes)
    variants = [
        _Names(tuple(map(cache_input, variant.reads)), tuple(map(cache_output, variant.writes)), variant.predicts)
        for variant in planned.plan.variants
    ]
    launches = [(launch.step, launch.variant) for launch in planned.plan.launches]
    recorder = Recorder(variants, launches, inputs.guidance_scale, planned.stack.slots)
    _run_supernet(planned, recorder, inputs)
    return recorder.recordings


def record_steps(planned: PlannedExport, plan: PlanEntry) -> list[StepRecording]:
    """Recordings of the evaluations in which each segment is launched once at least."""
    from dipgo_deploy.compare.steps import StepRecorder

    inputs = _inputs(planned)
    launches = [(launch.step, launch.variant) for launch in plan.launches]
    schedule = planned.schedule.with_gates(planned.plan.keep)
    recorder = StepRecorder(plan.variants, launches, schedule, inputs.guidance_scale, planned.stack.slots)
    _run_supernet(planned, recorder, inputs)
    return recorder.recordings


def _inputs(planned: PlannedExport, sizes: Sizes | None = None) -> ReferenceInputs:
    from dipgo_deploy.compare.conditions import reference_inputs
    from dipgo_deploy.export.trace import condition_specs

    source, shape, conditions = planned.source, planned.traced.shape, planned.traced.conditions
    if sizes is not None:
        shape = shape.at(sizes)
        conditions = condition_specs(source.family, source.config, shape)
    return reference_inputs(
        source,
        conditions,
        (shape.batch, source.family.latent_channels(source.config), shape.height, shape.width),
        noises=planned.matrix.noises,
        guidance=shape.guidance,
        begin=None if planned.image is None else planned.image.begin,
    )


def _run_supernet(planned: PlannedExport, recorder: LoopRecorder, inputs: ReferenceInputs) -> None:
    from dipgo_deploy.compare.recording import run_until_complete

    schedule = planned.schedule
    run_until_complete(
        recorder,
        planned.source.supernet(schedule.model.granularity, schedule.cache_kinds),
        planned.scheduler,
        schedule.sampler.num_inference_steps,
        planned.plan.keep,
        inputs,
        planned.set_timesteps,
    )


def check_variants(planned: PlannedExport, variants: tuple[VariantEntry, ...], stage: Path) -> Agreement | None:
    """Run each variant once on ONNX Runtime's CPU provider and compare it with its recording; how far they agree.

    Open sizes: at the usual ones, and at all corners of the ranges that differ in more than the batch, because an
    extent that the trace took for a constant shows only at another one.

    bf16 graphs are not run (None): that provider has no bf16 kernels; they pass the checker only.

    Raises:
        ToleranceError: names variant, tensor and both errors.
    """
    if planned.options.dtype == "bf16":
        return None
    tolerance = planned.source.family.tolerances[planned.options.dtype]
    ranges = planned.traced.shape.sizes
    half = planned.options.dtype != "fp32"
    return worst(
        compare_recordings(record(planned, sizes), variants, stage, tolerance, sizes, half=half)
        for sizes in ((None,) if ranges is None else corners(ranges))
    )


def compare_recordings(
    recordings: Iterable[Recording],
    variants: Sequence[VariantEntry],
    stage: Path,
    tolerance: float,
    sizes: Sizes | None = None,
    *,
    half: bool,
) -> Agreement:
    """Run the graphs below ``stage`` on recordings of their inputs; raises ToleranceError as ``check_variants``.

    half: whether the graphs have half-precision weights."""
    found = []
    at = "" if sizes is None else f" at {sizes.batch} x {sizes.height}x{sizes.width}"
    for recording in recordings:
        entry = variants[recording.variant]
        for name, actual in run_graph(stage / entry.graph.file, entry, recording.inputs, half=half).items():
            found.append(agreement(actual, recording.outputs[name]))
            error = found[-1].relative
            if not error <= tolerance:
                raise ToleranceError(
                    f"variant {entry.name}{at}, step {recording.step}, {name}: relative error {error:.2e} against "
                    f"the supernet, above {tolerance:g}; nothing was written"
                )
    return worst(found)


def check_segments(planned: PlannedExport, plan: PlanEntry, stage: Path) -> Agreement | None:
    """Run evaluations on ONNX Runtime's CPU provider, launch by launch, until every segment ran, and compare what each
    writes with the supernet where that has it: predictions and what blocks store; how far they agree.

    bf16 graphs are not run (None): that provider has no bf16 kernels; they pass the checker only.

    Raises:
        ToleranceError: names segment, tensor and both errors.
    """
    dtype = planned.options.dtype
    if dtype == "bf16":
        return None
    return compare_steps(
        record_steps(planned, plan), plan, stage, planned.source.family.tolerances[dtype], half=dtype != "fp32"
    )


def compare_steps(
    recordings: Iterable[StepRecording],
    plan: PlanEntry,
    stage: Path,
    tolerance: float,
    *,
    half: bool,
    frugal: bool = False,
) -> Agreement:
    """Run recorded evaluations with the graphs below ``stage``; raises ToleranceError as ``check_segments``.

    frugal: no copies of weights, as ``run_graph``, and only those of one segment at a time; takes some more time.
    """
    import onnxruntime

    from dipgo_deploy.compare.steps import StepRunner

    sessions: dict[int, onnxruntime.InferenceSession] = {}
    options = _frugal_options(half) if frugal else None

    def run(segment: int, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        graph = plan.variants[segment].graph
        session = sessions.get(segment) or onnxruntime.InferenceSession(
            stage / graph.file, options, providers=["CPUExecutionProvider"]
        )
        if not frugal:
            sessions[segment] = session
        names = [spec.name for spec in graph.outputs]
        return dict(zip(names, session.run(names, feeds), strict=True))

    found = []
    evaluate = StepRunner(plan, run)
    for recording in recordings:
        for launched in evaluate(recording.step, recording.inputs):
            for name in launched.outputs.keys() & recording.outputs.keys():
                found.append(agreement(launched.outputs[name].astype(np.float32), recording.outputs[name]))
                error = found[-1].relative
                if not error <= tolerance:
                    raise ToleranceError(
                        f"segment {plan.variants[launched.segment].name}, step {recording.step}, {name}: relative "
                        f"error {error:.2e} against the supernet, above {tolerance:g}; nothing was written"
                    )
    return worst(found)


def run_graph(
    path: Path, entry: VariantEntry, inputs: dict[str, np.ndarray], *, half: bool = True
) -> dict[str, np.ndarray]:
    """One run on ONNX Runtime's CPU provider; inputs are cast to the graph's dtypes, outputs come as float32.

    half: whether the graph has half-precision weights."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, _frugal_options(half), providers=["CPUExecutionProvider"])
    feeds = {spec.name: inputs[spec.name].astype(spec.dtype, copy=False) for spec in entry.graph.inputs}
    names = [spec.name for spec in entry.graph.outputs]
    return {
        name: value.astype(np.float32, copy=False) for name, value in zip(names, session.run(names, feeds), strict=True)
    }


def _frugal_options(half: bool) -> onnxruntime.SessionOptions:
    """For a graph that runs once or a few times: its weights stay in their file, mapped."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Each of these would copy the weights, once or more, for a graph that runs once.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.enable_cpu_mem_arena = False
    if half:
        # The default order may convert the weights of many layers to float32 before any of them is used. Without
        # conversions it is the better one, by a sixth of the activations.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    return options
