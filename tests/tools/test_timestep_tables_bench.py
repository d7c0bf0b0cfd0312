"""The page on timestep tables."""

from __future__ import annotations

from typing import Any

from tools.bench.timestep_tables import as_text


def test_both_exports_of_a_model_stand_below_each_other() -> None:
    def side(weights: int, tables: int) -> dict[str, Any]:
        spread = {"median": 2.0 * 2**20, "q1": 2.0 * 2**20, "q3": 3.0 * 2**20}
        seconds = {"median": 1.25, "q1": 1.0, "q3": 1.5}
        export = {"seconds": 60.4, "peak_rss": 5 * 2**20, "variants": {"relative": 2e-6}}
        return {
            "export": export,
            "weights_bytes": weights * 2**20,
            "tables_bytes": tables * 2**20,
            "load_seconds": seconds,
            "evaluation_seconds": seconds,
            "loaded_bytes": spread,
            "ran_bytes": spread,
        }

    row = {
        "name": "some-model",
        "changes": {"num_layers": 2},
        "machine": {"processor": "a processor", "cores": 2, "threads": 1, "load_average": 0.1}
        | {"system": "Linux", "python": "3.11", "packages": {"torch": "2"}},
        "dtype": "fp32",
        "steps": 10,
        "width": 256,
        "height": 512,
        "sides": {"tables": side(70, 3), "no tables": side(100, 0)},
    }
    lines = [line for line in as_text([row]).splitlines() if line.startswith("| some-model")]
    model = "some-model (num_layers=2), 256x512, 10 steps"
    rest = "60 | 5 | 1.2 (1.0-1.5) | 2 / 2 | 1.25 (1.00-1.50) | 2.0e-06 |"
    assert lines == [
        f"| {model} | fp32 | tables | 70 | 3.0 | {rest}",
        f"| {model} | fp32 | no tables | 100 | 0.0 | {rest}",
    ]
