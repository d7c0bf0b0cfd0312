"""Tiny random models on disk, schedules for them, and engine directories really exported from them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DConditionModel,
)
from family_checks import random_weights

from dipgo_deploy.bundle.directory import reseal
from dipgo_deploy.bundle.manifest import VariantEntry, seal_of
from dipgo_deploy.bundle.staging import staged_directory
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export
from dipgo_deploy.export.writing import write_bundle
from dipgo_deploy.models.family import Granularity
from dipgo_deploy.models.location import denoiser_config
from dipgo_deploy.sampler import evaluations, make_scheduler
from dipgo_deploy.schedule.document import Schedule, gate_rows
from dipgo_deploy.schedule.identity import config_hash
from dipgo_deploy.supernet.load import load_denoiser

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
LABELS = {"boot": 0, "bag": 1, "coat": 2}
STEPS = 6


def tiny_unet(layers: int = 1) -> UNet2DConditionModel:
    """SD-1.5's kinds of blocks, each once; latents (B, 4, 8, 8), text (B, 77, 16)."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=layers,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    return random_weights(model)


def save_unet(folder: Path) -> Path:
    """A folder that holds only a denoiser, ``tiny_unet``."""
    tiny_unet().save_pretrained(folder)
    return folder


def save_dit_pipeline(folder: Path, *, layers: int = 4) -> Path:
    """A pipeline with four transformer blocks, three named classes of ten and a VAE; latents (B, 4, 8, 8)."""
    torch.manual_seed(1)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    DiTPipeline(random_weights(transformer), vae.eval(), DDIMScheduler(**BETAS)).save_pretrained(folder)
    index = folder / "model_index.json"  # the pipeline reads class names from there, but does not save them
    names = {str(number): name for name, number in LABELS.items()}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": names}))
    return folder


def schedule_for(
    folder: Path,
    *,
    ratio: float = 0.5,
    seed: int = 0,
    cache: str | None = None,
    sampler: str = "ddim",
    granularity: Granularity = "block",
) -> Schedule:
    """``STEPS`` steps of ``sampler``; after the first evaluation each block is removed with probability ``ratio``."""
    family, config = denoiser_config(folder)
    specs = family.blocks(config, granularity)
    scheduler = make_scheduler(sampler, BETAS)
    count = evaluations(scheduler, STEPS)
    source = random.Random(seed)
    gates = [[step == 0 or source.random() >= ratio for _ in specs] for step in range(count)]
    return Schedule.model_validate(
        {
            "model": {"class_name": family.class_name, "config_hash": config_hash(config), "granularity": granularity},
            "blocks": [{"name": spec.name, "cache": cache or spec.caches[0]} for spec in specs],
            "steps": count,
            "keep": gate_rows(gates),
            "sampler": {
                "class_name": type(scheduler).__name__,
                "config": {key: value for key, value in scheduler.config.items() if not key.startswith("_")},
                "num_inference_steps": STEPS,
            },
        }
    )


def write(planned: PlannedExport, folder: Path) -> Path:
    """Write an engine directory without the exporter's own comparison."""
    unchecked = replace(planned, options=replace(planned.options, check=False))
    with staged_directory(folder) as stage:
        write_bundle(unchecked, stage)
    return folder


def changed(engine_dir: Path, folder: Path, edit: Callable[[Any], None]) -> Path:
    """A copy with its manifest's JSON edited in place by ``edit``, and sealed again whether it can be right or not."""
    shutil.copytree(engine_dir, folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps({**manifest, "seal": seal_of(manifest)}))
    return folder


def corrupted(engine_dir: Path, folder: Path, graph: str, weight: str) -> Path:
    """A copy in which the values of one weight, as a variant's graph names it, are negated in the weights file."""
    import numpy as np
    import onnx

    shutil.copytree(engine_dir, folder)
    model = onnx.load(folder / "graphs" / graph, load_external_data=False)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == weight)
    fields = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / "graphs" / fields["location"]).open("r+b") as file:
        file.seek(int(fields["offset"]))
        values = np.frombuffer(file.read(int(fields["length"])), np.float32)
        file.seek(int(fields["offset"]))
        file.write((-values).tobytes())
    reseal(folder)
    return folder


def stored_weights(engine: Path, entry: VariantEntry) -> list[str]:
    """Names of a graph's tensors in the weights file."""
    import onnx

    graph = onnx.load(engine / entry.graph.file, load_external_data=False).graph
    return [tensor.name for tensor in graph.initializer if tensor.external_data]


def save_in_half(model: Path, folder: Path) -> Path:
    """The same pipeline with its denoiser, a transformer, stored in float16, in several files."""
    shutil.copytree(model, folder)
    shutil.rmtree(folder / "transformer")
    load_denoiser(model)[0].half().save_pretrained(folder / "transformer", max_shard_size="20KB")
    return folder


def plan_variants(model: Path, **options: Any) -> PlannedExport:
    """The export of a schedule for this model, in variants and without components unless told else."""
    return plan_export(
        str(model), schedule_for(model), ExportOptions(**{"layout": "variants", "components": False, **options})
    )
