from __future__ import annotations

from pathlib import Path

import pytest
from toy_engine import CLASSES, Toy, build

from dipgo_deploy.bench.metrics import Metric
from dipgo_deploy.errors import UserError
from tools.bench.engine_quality import compare, conditions

# Pictures of toys are smaller than the window of the SSIM.
LIKENESS = Metric("likeness", True, 4, lambda made, full, _: 1 - (made - full).abs().amax((1, 2, 3)))


def test_pictures_are_compared_with_those_of_the_reference_directory_from_the_same_seeds(tmp_path: Path) -> None:
    full = build(tmp_path / "full", Toy(kind="class"))
    half = build(tmp_path / "half", Toy(kind="class", dtype="fp16"))
    each = conditions(full, None)
    assert each == [{"class_labels": number} for number in CLASSES.values()]
    same, close = compare(full, (full, half), 4, each, 4.0, 1, (LIKENESS,))
    assert same["likeness"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert 0.9 < close["likeness"]["value"] < 1
    assert (same["dtype"], close["dtype"], same["launches"]) == ("fp32", "fp16", 6)


def test_a_text_model_needs_prompts(tmp_path: Path) -> None:
    toy = build(tmp_path / "toy", Toy(kind="text"))
    with pytest.raises(UserError, match="give --prompts"):
        conditions(toy, None)
    (tmp_path / "prompts.txt").write_text("a boot\na red bag\n", encoding="utf-8")
    assert conditions(toy, tmp_path / "prompts.txt") == [{"prompt": "a boot"}, {"prompt": "a red bag"}]
