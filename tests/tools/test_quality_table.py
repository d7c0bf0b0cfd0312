"""Results of a measurement as a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench.quality_table import main


def test_a_table_for_each_guidance_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(name: str, scale: float, ssim: float) -> dict[str, object]:
        estimate = {"value": ssim, "low": ssim - 0.01, "high": ssim + 0.01}
        none = dict.fromkeys(("difference", "accuracy", "frechet"))
        return {"name": name, "guidance_scale": scale, "launches": 5, "macs": 2_500_000_000, "ssim": estimate, **none}

    facts = {
        "model": "fashion-sd",
        "images": 40,
        "reference": {"sampler": "DDIMScheduler", "steps": 50},
        "full_run": [row("full run", 4.0, 1.0), row("full run", 2.0, 1.0)],
        "cases": [row("a/five.json", 4.0, 0.98), row("a/five.json", 2.0, 0.97)],
        "fewest_launches": [{"guidance_scale": 4.0, "ssim": 0.99, "ours": 7, "baseline": None}],
    }
    (tmp_path / "q.json").write_text(json.dumps(facts))
    assert main([str(tmp_path / "q.json")]) == 0
    text = capsys.readouterr().out
    assert text.index("guidance 4, 40 images") < text.index("0.9800 +- 0.0100") < text.index("guidance 2, 40 images")
    assert text.index("guidance 2") < text.index("0.9700 +- 0.0100")
    assert "| five.json | 5 | 2.50 |" in " ".join(text.split("\n")).replace("  ", " ")
    assert "- Fewest launches for SSIM 0.99 at guidance 4: schedules 7, plain solvers none." in text


def test_schedules_stand_beside_the_best_plain_solver(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(name: str, ssim: float, against: str, baseline: bool) -> dict[str, object]:
        estimate = {"value": ssim, "low": ssim - 0.01, "high": ssim + 0.01}
        difference = {"value": ssim - 0.96, "low": ssim - 0.965, "high": ssim - 0.955}
        facts = {"name": name, "guidance_scale": 4.0, "launches": 5, "ssim": estimate, "difference": difference}
        return {**facts, "against": against, "baseline": baseline}

    plain = "deis, 5 steps"
    rows = [
        row("a/five.json", 0.98, plain, False),
        row(plain, 0.96, plain, True),
        row("ddim, 5 steps", 0.9, plain, True),
    ]
    (tmp_path / "q.json").write_text(json.dumps({"images": 40, "cases": rows}))
    assert main(["--best", str(tmp_path / "q.json")]) == 0
    _, _, *lines = capsys.readouterr().out.strip().splitlines()
    (line,) = lines
    assert line == (
        "| `five.json` | 4 | 5 | 0.9800 +- 0.0100 | deis, 5 steps | 0.9600 +- 0.0100 | 0.0200 +- 0.0050 | 40 |"
    )
