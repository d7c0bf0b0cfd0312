from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.demo import MARGIN, OURS, SCALE, main, prompt_of, sheet, summary


def test_prompts_are_those_of_the_training() -> None:
    assert prompt_of("sneaker") == "a photo of a sneaker"
    assert prompt_of("ankle boot") == "a photo of an ankle boot"


def test_a_sheet_has_a_row_for_each_loop() -> None:
    picture = sheet([[Image.new("RGB", (8, 6), "red")] * 3, [Image.new("RGB", (8, 6), "blue")] * 3])
    assert picture.size == (SCALE * (3 * (8 + MARGIN) + MARGIN), SCALE * (2 * (6 + MARGIN) + MARGIN))
    assert picture.getpixel((SCALE * MARGIN, SCALE * MARGIN)) == (255, 0, 0)
    assert picture.getpixel((SCALE * MARGIN, SCALE * (2 * MARGIN + 6))) == (0, 0, 255)
    assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_the_table_has_times_with_their_spread_and_quality() -> None:
    def loop(launches: int, median: float) -> dict[str, object]:
        return {"launches": launches, "loop_ms": {"median": median, "q1": median - 1, "q3": median + 1}}

    plain = {"name": "ddim, 5 steps", "ssim": 0.9, "low": 0.85, "high": 0.95}
    facts = {
        "full": loop(50, 250.0),
        "pruned": loop(5, 25.0),
        "ideal_speedup": 10.0,
        "speedup": {"median": 9.5, "q1": 9.0, "q3": 10.0},
        "quality": [{"name": OURS, "ssim": 0.99, "low": 0.985, "high": 0.995}, plain],
    }
    _, full, ours, solver, speedup, _ = summary(facts, 9)
    assert "250.0 (249.0-251.0)" in full
    assert "25.0 (24.0-26.0)" in ours and "0.9900 (0.9850-0.9950)" in ours
    assert solver.split() == ["ddim,", "5", "steps", "5", "0.9000", "(0.8500-0.9500)"]
    assert "measured 9.50 (9.00-10.00), ideal 10.00" in speedup and "quotient 0.95 (0.90-1.00)" in speedup
    assert "not measured" in summary({**facts, "quality": []}, 9)[2]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["fashion-sd", "fashion-dit"])
def test_the_demo_draws_measures_and_judges(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", model, "--folder", str(tmp_path), "--repeats", "3", "--threads", "1", "--json"]
    assert main([*arguments, "--per-condition", "2"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["full"]["launches"] == 50 and facts["pruned"]["launches"] == 5
    assert facts["ideal_speedup"] == pytest.approx(10, rel=1e-3)
    assert facts["speedup"]["median"] > 1
    assert np.asarray(Image.open(facts["picture"])).std() > 10
    ours, *plain = facts["quality"]
    assert ours["ssim"] > 0.98 and all(ours["ssim"] > other["ssim"] for other in plain)
