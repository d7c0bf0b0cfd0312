"""The report as JSON and as a table for readers."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dipgo_deploy.backends.tensorrt_cuda import Device


def described(device: Device) -> dict[str, Any]:
    """GPU, driver and package versions."""
    import importlib.metadata as metadata

    import torch

    found: dict[str, str | None] = {}
    for package in ("torch", "diffusers", "onnx", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "tensorrt-rtx-cu13"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver: str | None = None  # stays so, and is reported so, where nvidia-smi cannot tell
    with suppress(OSError, subprocess.CalledProcessError, IndexError):
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    return {
        "name": device.name,
        "compute_capability": device.capability,
        "memory_bytes": device.memory_bytes,
        "driver": driver,
        "cuda_of_torch": torch.version.cuda,
        "packages": found,
    }


def table(report: Mapping[str, Any]) -> str:
    """Markdown: one table a model, one row a case and runner."""
    gpu = report["gpu"]
    lines = [f"# {gpu['name']} ({gpu['compute_capability']}), driver {gpu['driver']}", ""]
    if report["tests"]:
        lines += [f"GPU tests: {report['tests']['summary']}", ""]
    head = ["model", "case", "runner", "ms/loop", "speed-up", "MAC ratio", "difference", "MiB", "floor ms", "gaps ms"]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    full = {
        (case["model"], run["what"]): run.get("ms_median")
        for case in report["cases"]
        if case["case"] == "full"
        for run in case["runs"]
    }
    for case in report["cases"]:
        for run in case["runs"]:
            cells = [case["model"], case["case"], run["what"]]
            if "error" in run:
                lines.append("| " + " | ".join([*cells, run["error"], *[""] * 6]) + " |")
                continue
            base = full.get((case["model"], run["what"]))
            cells += [
                f"{run['ms_median']:.2f}",
                f"{base / run['ms_median']:.2f}" if base else "",
                f"{case['mac_ratio']:.2f}",
                f"{run['difference']:.1e}",
                f"{run['device_bytes'] / 2**20:.0f}",
                f"{case['floor_ms']:.2f}",
                f"{run['gaps']['gap_ms']:.2f}" if run["gaps"] else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    if report.get("not_run"):
        lines += ["", "Not run, no time left: " + "; ".join(report["not_run"]) + "."]
    if report["failures"]:
        lines += ["", "Failures:", *(f"- {failure}" for failure in report["failures"])]
    return "\n".join(lines) + "\n"


def save(report: Mapping[str, Any], device: Device, folder: Path) -> None:
    """Write the JSON and the table under the GPU's name into ``folder``."""
    from dipgo_deploy.files import write_atomic

    name = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{name}.json", json.dumps(report, indent=1).encode() + b"\n")
    write_atomic(folder / f"{name}.md", table(report).encode())
