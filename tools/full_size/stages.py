"""The stages of a full-size export, each a process of its own: ``python -m tools.full_size.stages STAGE``.

Arguments come as JSON on the standard input; the result is the last line of the standard output.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dipgo_deploy.compare.metrics import Agreement, TensorError


def weights(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Write the model's folder with random weights."""
    from tools.full_size.weights import write_model

    entry = arguments["entry"]
    config = {**entry["config"], **arguments["changes"]}
    folder = Path(arguments["folder"])
    return {"parameters": write_model(entry, config, arguments["dtype"], folder), "bytes": folder_bytes(folder)}


def export(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Plan and publish; the seconds of each of the exporter's own stages."""
    from dipgo_deploy.export.exporter import ExportOptions, plan_export, publish
    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.schedule.document import Schedule

    quiet_libraries()
    libraries = _resident()
    clock = _Clock()
    schedule = Schedule.load(Path(arguments["schedule"]))
    planned = plan_export(arguments["folder"], schedule, ExportOptions(**arguments["options"]), clock)
    agreed: list[Agreement] = []
    bundle = publish(planned, Path(arguments["engine_dir"]), clock, agreed.append)
    plan = bundle.manifest.plan
    return {
        "stages": clock.stop(),
        "libraries_rss": libraries,
        "low_memory": bool(planned.options.low_memory),
        "evaluations": plan.evaluations,
        "launches": len(plan.launches),
        "graphs": len(plan.variants),
        "nodes_traced": len(list(planned.traced.model.graph)),
        "arena_bytes": plan.arena_bytes,
        "macs_full": plan.macs_full,
        "macs_run": plan.macs_run,
        "engine_dir_bytes": folder_bytes(bundle.path),
        "weights_bytes": (bundle.path / "graphs/weights.bin").stat().st_size,
        # Publishing runs ONNX's full checker on every graph and, if asked, compares each with the supernet.
        "checker": "passed",
        "variants": {key: _finite(value) for key, value in agreed[0]._asdict().items()} if agreed else None,
        "tolerance": planned.source.family.tolerances[planned.options.dtype],
    }


def compare(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The whole loop against the torch supernet in float32, both going their own way from the same noise."""
    from dipgo_deploy.backends import create_backend
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.compare.engine import Options, compare_engine
    from dipgo_deploy.reference.load import load_reference
    from dipgo_deploy.reference.mapped import float32_files, give_back_after_use
    from dipgo_deploy.reference.quiet import quiet_libraries

    quiet_libraries()
    clock = _Clock()
    clock("loading the model")
    bundle = Bundle.open(Path(arguments["engine_dir"]))
    manifest = bundle.manifest
    with float32_files(arguments["folder"], bundle.path.parent) as weights:
        reference = load_reference(bundle, weights=weights)
        give_back_after_use(reference.source.denoiser)
        inputs = reference.inputs(manifest, guidance_scale=manifest.guidance_scale)
        backend = create_backend("cpu", threads=arguments["threads"], share_weights=True)
        report = compare_engine(bundle, reference, inputs, backend, Options(variants=False, components=False), clock)
    assert report.results is not None
    final = [tensor for tensor in report.results.tensors if tensor.name == "latents"]
    on_the_way = [tensor for step in report.loop for tensor in step.tensors]
    return {
        "passed": report.passed,
        "first_failure": report.first_failure(),
        "tolerance": report.tolerance.relative,
        "stages": clock.stop(),
        "loop": _worst(on_the_way),
        "latents": _worst(final),
    }


def _worst(tensors: Sequence[TensorError]) -> dict[str, float | None]:
    """The largest error relative to the largest value, the smallest PSNR (dB) and cosine; null where not finite."""
    return {
        "relative": _finite(max(tensor.relative for tensor in tensors)),
        "psnr": _finite(min(tensor.psnr for tensor in tensors)),
        "cosine": _finite(min(tensor.cosine for tensor in tensors)),
    }


def build(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """TensorRT-RTX engines of all variants, without a GPU."""
    from dipgo_deploy.engine.build import build_engines

    report = build_engines(Path(arguments["engine_dir"]), "tensorrt-rtx")
    sizes = [engine.record.plan_bytes for engine in report.engines]
    return {"version": report.version, "engines": len(sizes), "bytes": sum(sizes), "largest_bytes": max(sizes)}


def calibrate(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A solver for every ``interval``-th evaluation of a sampler, fitted in torch in float32 on random conditions."""
    from dipgo_deploy.calibrate.core import CalibrationOptions
    from dipgo_deploy.calibrate.fit import calibrate as fit
    from dipgo_deploy.calibrate.fitted import residual_of
    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.schedule.builders import uniform
    from dipgo_deploy.search.problem import ProblemOptions, load_problem

    quiet_libraries()
    clock = _Clock()
    problem = load_problem(ProblemOptions(arguments["folder"], **arguments["problem"], random_conditions=True), clock)
    target = problem.target
    schedule = target.schedule(uniform(target.steps, len(target.blocks), arguments["interval"]), "uniform", {})
    images = arguments["images"]
    options = CalibrationOptions(images=images, held_aside=1 / images, batch=1)
    clock("calibrating")
    fitted = fit(problem, schedule, options)
    assert fitted.solver is not None
    evaluations = images * (target.steps + fitted.steps)
    return {
        "stages": clock.stop(),
        "launches": fitted.steps,
        "full": target.steps,
        "images": images,
        "evaluations": evaluations,
        "guidance": problem.guidance_scale is not None,
        "residual": residual_of(fitted.solver),
    }


STAGES: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "weights": weights,
    "export": export,
    "compare": compare,
    "build": build,
    "calibrate": calibrate,
}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _resident() -> int:
    """Bytes that this process holds with every library of an export loaded, and no model."""
    import diffusers  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401

    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class _Clock:
    """Called with the name of each stage as it begins."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._current: tuple[str, float] | None = None

    def __call__(self, stage: str) -> None:
        self.stop()
        self._current = (stage, time.perf_counter())
        print(stage, file=sys.stderr, flush=True)

    def stop(self) -> dict[str, float]:
        """Seconds by stage so far."""
        if self._current is not None:
            name, start = self._current
            self._seconds[name] = round(time.perf_counter() - start, 2)
            self._current = None
        return self._seconds


def main() -> int:
    """Run the stage that is named on the command line."""
    from dipgo_deploy.errors import ToleranceError, UserError

    try:
        result = STAGES[sys.argv[1]](json.load(sys.stdin))
    except (UserError, ToleranceError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(result, allow_nan=False), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
