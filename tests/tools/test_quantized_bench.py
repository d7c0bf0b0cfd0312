"""The page on quantized directories, and a fit with their own engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.bench.quantized import _collect, as_text

MACHINE = {"processor": "a processor", "cores": 2, "threads": 1, "load_average": 0.1} | {
    "system": "Linux",
    "python": "3.11",
    "packages": {"torch": "2"},
}


def test_the_page_has_a_line_for_each_side() -> None:
    seconds = {"median": 1.25, "q1": 1.0, "q3": 1.5}
    spread = {"median": 2.0 * 2**20, "q1": 2.0 * 2**20, "q3": 3.0 * 2**20}
    side: dict[str, Any] = {
        "export": {"seconds": 60.4, "peak_rss": 5 * 2**20, "variants": {"relative": 2e-2}},
        "weights_bytes": 70 * 2**20,
        "load_seconds": seconds,
        "evaluation_seconds": seconds,
        "loaded_bytes": spread,
        "ran_bytes": spread,
    }
    size = {"name": "some-model", "machine": MACHINE, "width": 256, "height": 256, "sides": {"int8": side}}
    metric = {"value": 0.9, "low": 0.85, "high": 0.95}
    case = {"directory": "int8 fitted", "launches": 5, "weights_bytes": 3 * 2**20, "ssim": metric, "psnr": metric}
    quality = {"schedule": "five", "machine": MACHINE, "cases": [case]}
    lines = as_text({"sizes": [size], "quality": [quality]}).splitlines()
    assert "| some-model, 256x256 | int8 | 70 | 60 | 1.2 (1.0-1.5) | 2 / 2 | 1.25 (1.00-1.50) | 2.0e-02 |" in lines
    assert "| five | int8 fitted | 5 | 3.0 | 0.9000 +- 0.0500 | 0.90 +- 0.05 |" in lines


def test_what_is_measured_later_stands_beside_the_rest(tmp_path: Path) -> None:
    """Of the same machine and settings; a case that is measured again is replaced."""

    def measured(images: int, **values: float) -> dict[str, Any]:
        cases = [
            {"directory": name.replace("_", " "), "launches": 5, "weights_bytes": 1, "ssim": metric, "psnr": metric}
            for name, value in values.items()
            for metric in [{"value": value, "low": value, "high": value}]
        ]
        return {"schedule": "five", "images": images, "machine": MACHINE | {"cores": len(values)}, "cases": cases}

    path = tmp_path / "found.json"
    _collect(path, "quality", measured(4, fp32=1.0, int8=0.5, fp32_fitted=1.0), "schedule")
    _collect(path, "quality", measured(4, fp8=0.25, int8=0.75), "schedule")
    (row,) = json.loads(path.read_text())["quality"]
    found = {case["directory"]: case["ssim"]["value"] for case in row["cases"]}
    assert list(found.items()) == [("fp32", 1.0), ("int8", 0.75), ("fp8", 0.25), ("fp32 fitted", 1.0)]
    _collect(path, "quality", measured(9, fp8=0.5), "schedule")
    (row,) = json.loads(path.read_text())["quality"]
    assert [case["directory"] for case in row["cases"]] == ["fp8"]
