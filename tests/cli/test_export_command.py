"""``dipgo-export``: what it says of an export that was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_engines import save_dit_pipeline, schedule_for

from dipgo_deploy.cli.export import main
from dipgo_deploy.export import low_memory


@pytest.mark.parametrize("large", [False, True])
def test_agreement_and_how_large_weights_were_held(
    large: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_memory, "LARGE_BYTES", 1000 if large else 2**30)
    model = save_dit_pipeline(tmp_path / "model", layers=2)
    schedule_for(model).save(tmp_path / "schedule.json")
    arguments = ["--model", str(model), "--schedule", str(tmp_path / "schedule.json"), "--json"]
    # Components for Triton's model, which they take seconds to make.
    arguments += ["--no-components"] if large else ["--triton", str(tmp_path / "repository")]
    assert main([*arguments, "--engine-dir", str(tmp_path / "engine")]) == 0
    shown = capsys.readouterr()
    facts = json.loads(shown.out)
    assert facts["worth"]["line"].startswith("worth: ") and facts["worth"]["line"] in shown.err
    agreement = facts["agreement"]
    assert 0 < agreement["relative"] < 1e-4 and agreement["psnr"] > 80 and agreement["cosine"] > 0.999999
    assert f"variants against the supernet: largest error {agreement['relative']:.1e}" in shown.err
    assert ("held once, compared in processes of their own" in shown.err) == large
    assert ("loading the model, holding its weights once" in shown.err) == large
    if not large:
        assert facts["triton"] == str(tmp_path / "repository/engine") and "engine: model engine" in shown.err
        assert str(tmp_path / "engine") in (tmp_path / "repository/engine/config.pbtxt").read_text()


def test_a_repository_that_cannot_get_it_is_refused_before_the_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "repository/engine").mkdir(parents=True)
    arguments = ["--model", "none", "--schedule", "none.json", "--triton", str(tmp_path / "repository")]
    written = ["--engine-dir", str(tmp_path / "engine")]
    for options, message in (
        (written, "repository/engine: exists"),
        ([*written, "--no-components"], "--triton: not with --no-components"),
        ([*written, "--strength", "0.5"], "--triton: not with --strength"),
        (["--plan-only"], "--triton: nothing is written with --plan-only"),
    ):
        assert main([*arguments, *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
