"""Models whose folders say more than an export takes: what is refused, what an option takes, what is recorded."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from sd_pipelines import save_sd15
from tiny_engines import save_dit_pipeline

from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.cli.export import main as export
from dipgo_deploy.cli.schedule import main as schedule
from dipgo_deploy.models.location import resolve_model
from dipgo_deploy.reference.load import load_reference


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Stable Diffusion as another pipeline's, in half-precision files' names, with a safety checker."""
    monkeypatch.chdir(tmp_path)
    folder = save_sd15(tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionImg2ImgPipeline"
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    return folder


def test_the_parts_of_another_pipeline_by_an_option(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    made = ["uniform", "--model", "model", "--steps", "2", "--interval", "1", "-o", "s.json"]
    assert schedule(made) == 2
    assert "StableDiffusionImg2ImgPipeline is not supported, only StableDiffusionPipeline or" in capsys.readouterr().err
    pipeline = ["--pipeline", "StableDiffusionPipeline"]
    assert schedule([*made, *pipeline]) == 0
    files = ["--schedule", "s.json", "--engine-dir", "engine"]
    arguments = ["--model", "model", *files, "--variant", "fp16", "--no-check"]
    assert export(arguments) == 2
    caplog.clear()
    assert export([*arguments, *pipeline]) == 0
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("dipgo_deploy")]
    named = "model?variant=fp16&pipeline=StableDiffusionPipeline"
    assert ours == [f"{named}: the engine directory has no safety_checker; nothing checks the pictures"]
    # The manifest names the model for any working directory, and how it was read.
    bundle = Bundle.open(tmp_path / "engine")
    assert bundle.manifest.model.name == f"{tmp_path}/{named}"
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "s.json", tmp_path / "elsewhere")
    assert load_reference(bundle).source.name == bundle.manifest.model.name


def test_a_model_that_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_dit_pipeline(tmp_path / "folder", layers=1)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").rename("model.safetensors")
    made = ["uniform", "--model", "model.safetensors", "--steps", "2", "--interval", "1", "-o", "s.json"]
    assert schedule(made) == 2
    assert "model.safetensors: one file does not say what its model is; give --config" in capsys.readouterr().err
    assert schedule([*made, "--config", "folder"]) == 0
    arguments = ["--model", "model.safetensors", "--schedule", "s.json", "--engine-dir", "engine", "--no-components"]
    assert export([*arguments, "--config", "folder"]) == 0
    bundle = Bundle.open(tmp_path / "engine")
    assert bundle.manifest.model.name == f"{tmp_path}/model.safetensors?config={folder}"
    assert load_reference(bundle).source.name == bundle.manifest.model.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "fashion-dit"], "made for UNet2DConditionModel, this model is DiTTransformer2DModel"),
        (["--model", "fashion-sd", "--height", "30"], "--height 30: give a multiple of 4 pixels"),
        (["--model", "fashion-dit", "--allow-other-config"], "made for UNet2DConditionModel"),
    ],
)
def test_what_configurations_decide_is_refused_before_anything_is_loaded(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = str(tmp_path / "s.json")
    assert schedule(["full", "--model", "fashion-sd", "--sampler", "ddim", "--steps", "2", "-o", path]) == 0
    monkeypatch.setattr("dipgo_deploy.export.planning.load_source", None)  # would raise when called
    assert export([*arguments, "--schedule", path, "--engine-dir", str(tmp_path / "engine")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()


def test_an_unknown_sampler_is_refused_before_diffusers_is_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it raises
    made = ["full", "--model", "fashion-sd", "--sampler", "dimm", "-o", str(tmp_path / "s.json")]
    assert schedule(made) == 2
    assert "sampler 'dimm' is unknown; use ddim, pndm," in capsys.readouterr().err


def test_a_text_encoder_without_a_tokenizer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(resolve_model("fashion-sd"), tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "tokenizer": [None, None]}))
    assert schedule(["full", "--model", "model", "--steps", "2", "-o", "s.json"]) == 0
    capsys.readouterr()
    assert export(["--model", "model", "--schedule", "s.json", "--engine-dir", "engine"]) == 2
    assert capsys.readouterr().err == (
        "error: model: has a text encoder, but no tokenizer: its model_index.json has to name one\n"
    )
