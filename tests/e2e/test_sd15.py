"""SD-1.5 in small: the full schedule makes what diffusers' own pipeline makes, with every sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from family_checks import plan_for, schedule_for, with_gates
from sd_pipelines import NEGATIVE, PROMPT, relative, save_sd15, stock

from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.reference.source import load_source
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.sampler import SAMPLERS

STEPS, SCALE = 6, 7.5
CALL = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": SCALE}
# A latent diffusion pipeline cannot use a flow's scheduler: it has no `scale_model_input`.
NAMES = [name for name in SAMPLERS if not name.startswith("flow-")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd15(tmp_path_factory.mktemp("sd15") / "model")


@pytest.fixture(scope="module")
def own(model: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(model, safety_checker=None)


@pytest.fixture(scope="module")
def traced(model: Path) -> PlannedExport:
    return plan_for(model, schedule_for(model, steps=STEPS))


@pytest.fixture(scope="module")
def text(own: Any) -> dict[str, np.ndarray]:
    with torch.no_grad():
        encoded = own.encode_prompt(PROMPT, torch.device("cpu"), 1, True, NEGATIVE)
    return dict(zip(("prompt_embeds", "negative_prompt_embeds"), (part.numpy() for part in encoded), strict=True))


@pytest.mark.parametrize("sampler", NAMES)
def test_latents_with_every_sampler(
    traced: PlannedExport, model: Path, own: Any, text: dict[str, np.ndarray], sampler: str, tmp_path: Path
) -> None:
    with_gates(traced, schedule_for(model, steps=STEPS, sampler=sampler), tmp_path / "x", components=False)
    pipeline = Pipeline.from_engine_dir(tmp_path / "x", "cpu", threads=1)
    got = pipeline(seed=3, guidance_scale=SCALE, output_type="latent", **text).latents
    assert relative(got, stock(own, sampler=sampler, steps=STEPS, output_type="latent", **CALL)) <= 1e-4


def test_pictures_of_several_prompts(traced: PlannedExport, own: Any, tmp_path: Path) -> None:
    """Two prompts with two pictures each, drawn in batches of one here and at once there."""
    publish(traced, tmp_path / "x")
    pipeline = Pipeline.from_engine_dir(tmp_path / "x", "cpu", threads=1)
    call = {"prompt": [PROMPT, ""], "num_images_per_prompt": 2, "guidance_scale": SCALE, "output_type": "np"}
    got = np.asarray(pipeline(seed=3, **call).images)
    assert relative(got, stock(own, steps=STEPS, **call)) <= 1e-4


def test_a_text_encoder_that_hides_its_padding_is_refused(model: Path) -> None:
    source = load_source(str(model))
    source.pipeline.text_encoder.config.use_attention_mask = True
    with pytest.raises(UserError, match="text_encoder: use_attention_mask is not supported"):
        source.trace_shape(batch=1, guidance=True, height=None, width=None)
