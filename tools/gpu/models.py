"""The models that are timed, at full size with random weights, and their inputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.make_schedules import DROPPED, KEPT

if TYPE_CHECKING:
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.schedule.builders import Target
    from dipgo_deploy.schedule.document import Gates

STEPS = 50
GUIDANCE_SCALE = 7.5
SD15: Mapping[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": 8,
    "layers_per_block": 2,
}
DIT_XL2: Mapping[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "norm_type": "ada_norm_zero",
    "num_embeds_ada_norm": 1000,
}
# What the published checkpoints of both come with; clipping would make the sampler non-linear.
DDIM: Mapping[str, Any] = {"_class_name": "DDIMScheduler", "clip_sample": False}
SD15_DDIM = {**DDIM, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


@dataclass(frozen=True)
class Model:
    """A denoiser of random weights: diffusers' class, its and the scheduler's configuration, the gates of each case."""

    name: str
    class_name: str
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    cases: Mapping[str, Callable[[Target], Gates]]


def released(target: Target) -> Gates:
    """The released SD-1.5 gates of ratio 0.80."""
    return tuple(
        tuple(step in KEPT and name not in DROPPED.get(step, ()) for name in target.block_names)
        for step in range(target.steps)
    )


def every(share: float) -> Callable[[Target], Gates]:
    """All blocks in this share of the steps, evenly spread, none in the others."""

    def gates(target: Target) -> Gates:
        rows = [step == 0 or int(step * share) != int((step - 1) * share) for step in range(target.steps)]
        return tuple((row,) * len(target.blocks) for row in rows)

    return gates


MODELS = (
    Model("sd15", "UNet2DConditionModel", SD15, SD15_DDIM, {"full": every(1.0), "released-0.80": released}),
    Model(
        "dit-xl2",
        "DiTTransformer2DModel",
        DIT_XL2,
        DDIM,
        {"full": every(1.0), "uniform-0.60": every(0.4), "uniform-0.75": every(0.25)},
    ),
)


def make_model(model: Model, folder: Path) -> Path:
    """A denoiser's folder in diffusers' format, random weights of a fixed seed, exactly representable in fp16."""
    import diffusers
    import torch

    torch.manual_seed(0)
    made = getattr(diffusers, model.class_name)(**model.config).half().float()
    made.save_pretrained(folder, safe_serialization=True)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(model.scheduler))
    return folder


@dataclass(frozen=True)
class Inputs:
    """One image: unit noise (1, C, h, w) float32, and the conditions of both halves, float32 or int64."""

    latents: np.ndarray
    conditions: Mapping[str, np.ndarray]


def make_inputs(bundle: Bundle) -> Inputs:
    """Seeded inputs of the manifest's shapes; the unconditional half comes first."""
    random = np.random.default_rng(0)
    manifest = bundle.manifest
    latent = manifest.latent
    conditions = {
        spec.name: np.arange(spec.shape[0], dtype=np.int64).reshape(spec.shape)
        if spec.dtype == "int64"
        else random.normal(size=spec.shape).astype(np.float32)
        for spec in manifest.conditions
    }
    shape = (manifest.batch, *latent.shape)
    return Inputs(random.normal(size=shape).astype(np.float32), conditions)
