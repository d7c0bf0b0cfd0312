"""The stages of a full-size export, each a process of its own: ``python -m tools.full_size.stages STAGE``.

Arguments come as JSON on the standard input; the result is the last line of the standard output.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


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
    from dipgo_deploy.export.quiet import quiet_libraries
    from dipgo_deploy.schedule.document import Schedule

    quiet_libraries()
    clock = _Clock()
    schedule = Schedule.load(Path(arguments["schedule"]))
    planned = plan_export(arguments["folder"], schedule, ExportOptions(**arguments["options"]), clock)
    bundle = publish(planned, Path(arguments["engine_dir"]), clock)
    plan = bundle.manifest.plan
    return {
        "stages": clock.stop(),
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
        "compared_with_supernet": planned.options.check and planned.options.dtype != "bf16",
    }


def compare(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The whole loop against the torch supernet, both going their own way from the same noise."""
    from dipgo_deploy.backends import create_backend
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.compare.conditions import reference_inputs
    from dipgo_deploy.compare.engine import Options, compare_engine
    from dipgo_deploy.compare.reference import load_reference
    from dipgo_deploy.export.quiet import quiet_libraries

    quiet_libraries()
    bundle = Bundle.open(Path(arguments["engine_dir"]))
    manifest, latent = bundle.manifest, bundle.manifest.latent
    reference = load_reference(bundle)
    inputs = reference_inputs(
        reference.source,
        reference.conditions,
        (manifest.batch, latent.channels, latent.height, latent.width),
        noises=manifest.plan.noises,
        guidance=manifest.guidance,
        guidance_scale=manifest.guidance_scale,
    )
    backend = create_backend("cpu", threads=arguments["threads"])
    report = compare_engine(bundle, reference, inputs, backend, Options(variants=False))
    assert report.results is not None
    (final,) = (tensor for tensor in report.results.tensors if tensor.name == "latents")
    failure = report.first_failure()
    return {
        "passed": failure is None,
        "tolerance": report.tolerance.relative,
        "latents_relative": _finite(final.relative),
        "worst_relative": _finite(max(tensor.relative for step in report.loop for tensor in step.tensors)),
    }


def build(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """TensorRT-RTX engines of all variants, without a GPU."""
    from dipgo_deploy.engine.build import build_engines

    report = build_engines(Path(arguments["engine_dir"]), "tensorrt-rtx")
    sizes = [engine.record.plan_bytes for engine in report.engines]
    return {"version": report.version, "engines": len(sizes), "bytes": sum(sizes), "largest_bytes": max(sizes)}


STAGES: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "weights": weights,
    "export": export,
    "compare": compare,
    "build": build,
}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


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
