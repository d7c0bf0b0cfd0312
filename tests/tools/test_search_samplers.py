from __future__ import annotations

import json
from pathlib import Path

import pytest
from search_models import save_dit

from tools.bench.search_samplers import main, spread
from tools.bench.search_sweep import LOG
from tools.bench.search_sweep import main as sweep

pytestmark = pytest.mark.usefixtures("traced_once")


def test_steps_to_spread_launches_over() -> None:
    assert spread(20, 60) == (20, 21, 22, 23, 30, 40, 60)
    assert spread(3, 6) == (3, 4, 5, 6)


def test_its_losses_are_those_a_search_sees_and_nothing_is_run_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, folder = str(save_dit(tmp_path / "dit")), tmp_path / "samplers.json", tmp_path / "sweep"
    same = ["--model", model, "--reference", "ddim:20", "--ratio", "0.8", "--images", "2", "--cache", "output"]
    args = [*same, "--sampler", "deis", "--sampler", "ddim", "--most", "8", "--out", str(out)]
    assert main(args) == 0
    text = out.read_text(encoding="utf-8")
    rows = {(row["sampler"], row["steps"]): row for row in json.loads(text)}
    assert set(rows) == {(sampler, steps) for sampler in ("deis", "ddim") for steps in (3, 4, 5, 6)}
    assert (
        sweep([*same, "--sampler", "deis", "--steps", "6", "--method", "refine", "--budget", "1", "--out", str(folder)])
        == 0
    )
    (searched,) = json.loads((folder / LOG).read_text(encoding="utf-8"))
    assert rows["deis", 6]["loss"] == pytest.approx(searched["start_losses"]["uniform"], rel=1e-5)
    assert rows["deis", 6]["achieved"] == pytest.approx(0.8, abs=0.0125)
    assert main(args) == 0
    assert out.read_text(encoding="utf-8") == text
