"""What stock pipelines correct when they load: run, not copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.location import resolve_model
from dipgo_deploy.models.stock import stock_configuration
from dipgo_deploy.models.target import schedule_target


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this project said, in any order."""
    return sorted(record.getMessage() for record in caplog.records if record.name.startswith("dipgo_deploy"))


def folder(path: Path, *, scheduler: dict[str, Any], pipeline: str = "StableDiffusionPipeline", **unet: Any) -> str:
    """The configuration files of the built-in model with other settings; None leaves one out."""
    own = Path(resolve_model("fashion-sd"))
    for name, changes in (
        ("scheduler/scheduler_config.json", scheduler),
        ("unet/config.json", unet),
        ("vae/config.json", {}),
        ("model_index.json", {"_class_name": pipeline}),
    ):
        changed = {**json.loads((own / name).read_text()), **changes}
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps({key: value for key, value in changed.items() if value != "left out"}))
    return str(path)


def test_old_schedulers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = folder(
        tmp_path, scheduler={"_class_name": "DDIMScheduler", "steps_offset": "left out", "clip_sample": True}
    )
    stock = stock_configuration(model)
    assert stock.scheduler is not None
    assert dict(stock.corrected) == {"steps_offset": 1, "clip_sample": False}
    assert (stock.scheduler.config.steps_offset, stock.scheduler.config.clip_sample) == (1, False)
    assert lines(caplog) == [
        f"{model}: StableDiffusionPipeline corrects clip_sample to False",
        f"{model}: StableDiffusionPipeline corrects steps_offset to 1",
    ]
    target = schedule_target(model, num_inference_steps=4)
    assert (target.sampler.config["steps_offset"], target.sampler.config["clip_sample"]) == (1, False)
    caplog.clear()
    stock.check(target.sampler)
    assert lines(caplog) == []
    # A schedule of before, and a sampler that somebody chose.
    old = target.sampler.model_copy(update={"config": {**target.sampler.config, "steps_offset": 0}})
    stock.check(old)
    assert len(lines(caplog)) == 1 and "has steps_offset = 0; the model's own pipeline runs with 1" in lines(caplog)[0]
    stock.check(old.model_copy(update={"class_name": "PNDMScheduler"}))
    assert len(lines(caplog)) == 1


def test_sizes_of_old_unets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert stock_configuration("fashion-sd").native == (8, 8)
    assert lines(caplog) == []
    model = folder(tmp_path, scheduler={}, sample_size=32, _diffusers_version="0.6.0")
    assert stock_configuration(model).native == (64, 64)
    assert lines(caplog) == [f"{model}: StableDiffusionPipeline corrects sample_size to 64"]


def test_the_scale_is_that_of_the_vae() -> None:
    assert stock_configuration("fashion-sd").scale == 4
    assert stock_configuration("fashion-dit").scale == 8  # its pipeline has no other
    assert stock_configuration(str(Path(resolve_model("fashion-sd")) / "unet")).scale == 8


def test_ddim_runs_its_own_scheduler(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, content in (
        ("model_index.json", {"_class_name": "DDIMPipeline", "unet": ["diffusers", "UNet2DModel"]}),
        ("unet/config.json", {"_class_name": "UNet2DModel", "sample_size": 8}),
        ("scheduler/scheduler_config.json", {"_class_name": "DDPMScheduler", "clip_sample": True}),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    stock = stock_configuration(str(tmp_path))
    assert type(stock.scheduler).__name__ == "DDIMScheduler"
    assert lines(caplog) == [f"{tmp_path}: DDIMPipeline runs DDIMScheduler instead of DDPMScheduler"]
    assert stock.scale == 1


def test_a_setting_that_no_configuration_can_have_is_refused(tmp_path: Path) -> None:
    model = folder(tmp_path, scheduler={}, **{"__class__": 2})
    with pytest.raises(UserError, match="UNet2DConditionModel: its configuration cannot be taken: __class__ must be"):
        stock_configuration(model)
