"""UNets that were distilled: from guidance, whose scale is an input (latent consistency models), and to fewer layers
(SSD-1B, BK-SDM: no mid block, depths that differ)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from family_checks import assert_pictures_equal_stock, plan_for, random_weights, schedule_for
from sd_pipelines import EULER, PROMPT, TOKENIZER, assert_equals_supernet, relative, stock, text_config
from transformers import AutoTokenizer, CLIPTextModel

from dipgo_deploy.export.exporter import publish
from dipgo_deploy.runtime.pipeline import Pipeline

STEPS = 3


def vae() -> AutoencoderKL:
    """Scale 2."""
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
    )
    return random_weights(model)


@pytest.fixture(scope="module")
def lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lcm") / "model"
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        norm_num_groups=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        time_cond_proj_dim=16,
    )
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=random_weights(CLIPTextModel(text_config(16, hidden_act="quick_gelu"))),
        tokenizer=AutoTokenizer.from_pretrained(TOKENIZER),
        unet=random_weights(unet),
        scheduler=LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def test_a_consistency_model_takes_the_scale_as_an_input(lcm: Path, tmp_path: Path) -> None:
    bundle = publish(plan_for(lcm, schedule_for(lcm, steps=STEPS)), tmp_path / "x")
    manifest = bundle.manifest
    assert [(spec.name, spec.source) for spec in manifest.conditions] == [
        ("encoder_hidden_states", "text"),
        ("guidance", "guidance"),
    ]
    assert not manifest.guidance and manifest.guidance_scale == 7.5
    own = StableDiffusionPipeline.from_pretrained(lcm, safety_checker=None)
    pipeline = Pipeline.from_engine_dir(bundle.path, "cpu", threads=1)
    call: dict[str, Any] = {"prompt": PROMPT, "output_type": "np"}
    pictures = {}
    for scale in (8.0, 1.5):
        pictures[scale] = np.asarray(pipeline(seed=3, guidance_scale=scale, **call).images)
        assert relative(pictures[scale], stock(own, steps=STEPS, guidance_scale=scale, **call)) <= 1e-4
    assert relative(pictures[8.0], pictures[1.5]) > 1e-3
    assert_pictures_equal_stock(bundle.path)


UNEVEN: dict[str, dict[str, Any]] = {
    "BK-SDM": {"mid_block_type": None, "layers_per_block": (1, 2)},
    "SSD-1B": {
        "mid_block_type": "UNetMidBlock2D",
        "layers_per_block": 2,
        "transformer_layers_per_block": ((1, 2), 1),
        "reverse_transformer_layers_per_block": (1, (2, 1, 1)),
    },
}


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        ("BK-SDM", "layer"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("BK-SDM", "block"), ("SSD-1B", "layer"))),
    ],
)
def test_uneven_unets_are_the_supernet(name: str, granularity: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "norm_num_groups": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
    }
    random_weights(UNet2DConditionModel(**{**settings, **UNEVEN[name]})).save_pretrained(tmp_path / "model")
    EulerDiscreteScheduler.from_config(EULER).save_pretrained(tmp_path / "model" / "scheduler")
    schedule = schedule_for(
        tmp_path / "model", ratio=0.5, steps=STEPS, sampler="euler-trailing", granularity=granularity, seed=4
    )
    publish(plan_for(tmp_path / "model", schedule, components=False), tmp_path / "x")
    assert_equals_supernet(tmp_path / "x")
