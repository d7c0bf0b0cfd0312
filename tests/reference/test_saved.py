from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from tiny_engines import LABELS, save_dit_pipeline

from dipgo_deploy.errors import ToleranceError, UserError
from dipgo_deploy.models.location import denoiser_config
from dipgo_deploy.reference.saved import is_pipeline, pipeline_name, saved_pipeline
from dipgo_deploy.reference.source import load_source
from dipgo_deploy.schedule.identity import config_hash


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dit_pipeline(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture
def pipeline(model: Path) -> DiTPipeline:
    return DiTPipeline.from_pretrained(model)


def test_what_is_saved_is_the_pipeline(model: Path, pipeline: DiTPipeline, tmp_path: Path) -> None:
    with saved_pipeline(pipeline, tmp_path / "engine") as folder:
        (family, config), (wanted_family, wanted_config) = map(denoiser_config, (folder, model))
        assert family is wanted_family and config_hash(config) == config_hash(wanted_config)
        source = load_source(folder)
        assert source.pipeline.labels == LABELS  # which DiTPipeline does not save
        for part in ("transformer", "vae"):
            found, wanted = (getattr(whole, part).state_dict() for whole in (source.pipeline, pipeline))
            assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert list(tmp_path.iterdir()) == []


def test_several_names_of_one_class_stay(pipeline: DiTPipeline, tmp_path: Path) -> None:
    pipeline.labels = {"tabby": 3, "tiger cat": 3}
    with saved_pipeline(pipeline, tmp_path / "engine") as folder:
        assert json.loads((Path(folder) / "model_index.json").read_text())["id2label"] == {"3": "tabby, tiger cat"}
        assert DiTPipeline.from_pretrained(folder).labels == pipeline.labels


def test_a_pipeline_is_told_from_a_name(model: Path, pipeline: DiTPipeline) -> None:
    assert is_pipeline(pipeline) and not is_pipeline(str(model)) and not is_pipeline(model)
    assert pipeline_name(pipeline) == str(model)
    assert pipeline_name(DiTPipeline(pipeline.transformer, pipeline.vae, pipeline.scheduler)) == "DiTPipeline"


def test_adapters_beside_the_weights_are_refused(pipeline: DiTPipeline, tmp_path: Path) -> None:
    pipeline.transformer.peft_config = {"default": object()}
    with (
        pytest.raises(UserError, match="transformer has adapters beside its weights: call fuse_lora"),
        saved_pipeline(pipeline, tmp_path / "engine"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [UserError, ToleranceError])
def test_errors_do_not_name_a_folder_that_is_gone(pipeline: DiTPipeline, tmp_path: Path, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="^the pipeline: no such layer$"), saved_pipeline(pipeline, tmp_path / "x") as folder:
        raise kind(f"{folder}: no such layer")
