"""Activations in 8 bits: which blocks are left out for a budget, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from toy_engine import Toy, build

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.difference import relative_rms
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.calibrated import (
    _within,
    check_recordable,
)
from dipgo_deploy.export.options import ExportOptions, check_options


class _Trial:
    """Errors of blocks that add up as independent ones do, times ``factor``."""

    def __init__(self, sensitivity: dict[str, float], factor: float) -> None:
        self._sensitivity, self._factor = sensitivity, factor

    def error(self, file: str, stays: Callable[[str], bool]) -> float:
        return self._factor * sum(e**2 for block, e in self._sensitivity.items() if not stays(block)) ** 0.5


@pytest.mark.parametrize(
    ("factor", "budget", "kept"),
    [(1.0, 1.0, ""), (1.0, 0.06, "c"), (2.0, 0.06, "bc"), (1.0, 0.001, "abc")],
)
def test_blocks_that_lose_most_stay_until_the_budget_is_met(factor: float, budget: float, kept: str) -> None:
    sensitivity = {"a": 0.02, "b": 0.05, "c": 0.3}
    found, error = _within(sensitivity, frozenset(["g"]), _Trial(sensitivity, factor), budget)  # type: ignore[arg-type]
    assert found == frozenset(kept) and error <= budget


def test_errors_are_relative_and_never_hidden() -> None:
    zeros, ones = np.zeros(4), np.ones(4)
    assert relative_rms(ones * 1.5, ones) == pytest.approx(0.5) and relative_rms(zeros, zeros) == 0
    assert relative_rms(ones, zeros) == relative_rms(np.array([np.nan, 1, 1, 1]), ones) == np.inf


def test_what_no_loop_can_be_recorded_of_is_refused(tmp_path: Path) -> None:
    manifest = Bundle.open(build(tmp_path / "toy", Toy())).manifest
    half = manifest.model_copy(update={"dtype": "bf16"})
    with pytest.raises(UserError, match=r"bf16 graphs do not run on a CPU.*use --quantize int8-weights"):
        check_recordable(half, "int8")
    text = manifest.model_copy(update={"components": manifest.components.model_copy(update={"text_encoder": None})})
    with pytest.raises(UserError, match="--quantize fp8: .*there is no text to record the loop with"):
        check_recordable(text, "fp8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize_budget": 0.1}, "--quantize-budget: goes with --quantize int8 or fp8"),
        (
            {"calibration_prompts": ("a",), "quantize": "int8-weights"},
            "--calibration-prompts: goes with --quantize int8 or fp8",
        ),
        ({"quantize": "int8", "quantize_budget": 0.0}, "--quantize-budget 0.0: give a number above 0"),
        ({"quantize": "int8", "calibration_samples": 0}, "calibration_samples"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_options(ExportOptions(**options))  # type: ignore[arg-type]
