from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.demo import MARGIN, SCALE, main, prompt_of, sheet


def test_prompts_are_those_of_the_training() -> None:
    assert prompt_of("sneaker") == "a photo of a sneaker"
    assert prompt_of("ankle boot") == "a photo of an ankle boot"


def test_a_sheet_has_a_row_for_each_loop() -> None:
    picture = sheet([[Image.new("RGB", (8, 6), "red")] * 3, [Image.new("RGB", (8, 6), "blue")] * 3])
    assert picture.size == (SCALE * (3 * (8 + MARGIN) + MARGIN), SCALE * (2 * (6 + MARGIN) + MARGIN))
    assert picture.getpixel((SCALE * MARGIN, SCALE * MARGIN)) == (255, 0, 0)
    assert picture.getpixel((SCALE * MARGIN, SCALE * (2 * MARGIN + 6))) == (0, 0, 255)
    assert picture.getpixel((0, 0)) == (255, 255, 255)


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
