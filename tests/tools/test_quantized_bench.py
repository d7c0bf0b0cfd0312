"""The page on quantized directories, and a fit with their own engines."""

from __future__ import annotations

from typing import Any

from tools.bench.quantized import as_text

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
