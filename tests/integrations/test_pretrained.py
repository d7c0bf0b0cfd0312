"""``Pipeline.from_pretrained``: an engine directory, or a model that is exported first."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_engines import save_dit_pipeline, schedule_for
from toy_engine import Toy, build

from dipgo_deploy import Pipeline
from dipgo_deploy.errors import UserError


def test_a_model_is_exported_and_opened(tmp_path: Path) -> None:
    model = save_dit_pipeline(tmp_path / "model", layers=1)
    schedule = schedule_for(model)
    schedule.save(tmp_path / "schedule.json")
    how: dict[str, Any] = {"components": False, "check": False, "threads": 1}
    pipeline = Pipeline.from_pretrained(
        model, "cpu", export=True, schedule=str(tmp_path / "schedule.json"), engine_dir=tmp_path / "engine", **how
    )
    assert pipeline.bundle.path == tmp_path / "engine"
    drawn = pipeline(class_labels=1, output_type="latent").latents
    again = Pipeline.from_pretrained(tmp_path / "engine", "cpu", threads=1)
    assert np.array_equal(again(class_labels=1, output_type="latent").latents, drawn)
    with pytest.raises(UserError, match="model: is no engine directory; give one, or export=True with a schedule"):
        Pipeline.from_pretrained(model)


def test_without_a_folder_it_goes_with_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(model: Any, schedule: Any, target: Path, options: Any) -> None:
        build(target, Toy())

    monkeypatch.setattr("dipgo_deploy.integrations.pretrained._export", written)
    pipeline = Pipeline.from_pretrained("model", "cpu", export=True, schedule="any.json", threads=1)
    folder = pipeline.bundle.path
    assert pipeline("a boot", output_type="latent").latents.shape[0] == 1 and folder.is_dir()
    del pipeline
    assert not folder.exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"export": True}, "schedule: missing"),
        ({"export": True, "schedule": "a.json", "dtyp": "fp16"}, "dtyp: is no option of an export"),
        ({"export": "yes"}, "export: 'yes'"),
        ({"dtype": "fp16"}, "dtype: is no option of loading an engine directory; .* export=True"),
        ({"engine_dir": "x"}, "engine_dir: is no option of loading"),
        ({"schedule": 3}, "schedule: 3"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    build(tmp_path / "engine", Toy())
    with pytest.raises(UserError, match=words):
        Pipeline.from_pretrained(tmp_path / "engine", "cpu", **given)


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dipgo_deploy.export.exporter", None)
    with pytest.raises(UserError, match=r"export=True: needs the extra export .*pip install .*\[export\]"):
        Pipeline.from_pretrained("fashion-dit", export=True, schedule="fashion-dit-ddim50-5")
