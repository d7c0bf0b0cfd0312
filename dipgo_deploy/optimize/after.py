"""What follows an optimisation: engines where a TensorRT and a GPU are there, and a page of what came out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dipgo_deploy.backends.tensorrt_cuda import NoDeviceError, find_device
from dipgo_deploy.backends.tensorrt_flavour import FLAVOURS
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.files import write_atomic
from dipgo_deploy.optimize.run import Optimized
from dipgo_deploy.report.given import Given
from dipgo_deploy.report.measured import Quality
from dipgo_deploy.report.page import report_page
from dipgo_deploy.report.subject import read_subject

REPORT = "report.html"


def engines_for(bundle: Bundle) -> tuple[tuple[str, ...], str]:
    """Backends that engines can be built for, here and now; and, where there are none, a line that says why."""
    there = [name for name, flavour in FLAVOURS.items() if importlib.util.find_spec(flavour.module) is not None]
    if not there:
        return (), ""
    try:
        find_device()
    except NoDeviceError as error:
        without = [name for name in there if FLAVOURS[name].builds_without_device]
        hint = f"; for other machines: dipgo-build --engine-dir {bundle.path} --backend {without[0]}" if without else ""
        return (), f"no engines were built: {error}{hint}"
    return tuple(there), ""


def write_report(result: Optimized, model: str) -> Path:
    """Write ``report.html`` into the engine directory: what is in it, and what its pictures were judged."""
    sampler = result.schedule.sampler
    document = {
        "model": model,
        "reference": {"sampler": sampler.class_name, "steps": sampler.num_inference_steps},
    }
    row = result.row
    judged = {} if row is None else {"images": len(row.per_image["ssim"]), "cases": [row.as_json()]}
    qualities = [] if row is None else [Quality.model_validate({**document, **judged})]
    no_pictures = "No pictures: dipgo-report --against draws them beside those of the full run's directory."
    page = report_page(read_subject(result.bundle), Given(qualities=qualities, no_pictures=no_pictures))
    target = result.bundle.path / REPORT
    write_atomic(target, page)
    return target
