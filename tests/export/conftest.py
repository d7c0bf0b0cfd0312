"""Tiny random denoisers on disk, each traced once for all tests of the session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from family_checks import random_weights
from tiny_engines import save_unet

from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, replan
from dipgo_deploy.models.family import Granularity
from dipgo_deploy.models.location import denoiser_config
from dipgo_deploy.sampler import evaluations, make_scheduler
from dipgo_deploy.schedule.document import Schedule, gate_rows
from dipgo_deploy.schedule.identity import config_hash

torch.set_num_threads(1)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
STEPS = 6


def schedule_for(folder: Path, *, cache: str | None = None, granularity: Granularity = "block") -> Schedule:
    """A DDIM schedule of ``STEPS`` steps for the denoiser in ``folder``, everything kept."""
    family, config = denoiser_config(folder)
    specs = family.blocks(config, granularity)
    scheduler = make_scheduler("ddim", BETAS)
    count = evaluations(scheduler, STEPS)
    return Schedule.model_validate(
        {
            "model": {
                "class_name": family.class_name,
                "config_hash": config_hash(config),
                "granularity": granularity,
            },
            "blocks": [{"name": spec.name, "cache": cache or spec.caches[0]} for spec in specs],
            "steps": count,
            "keep": gate_rows([[True] * len(specs)] * count),
            "sampler": {
                "class_name": type(scheduler).__name__,
                "config": {key: value for key, value in scheduler.config.items() if not key.startswith("_")},
                "num_inference_steps": STEPS,
            },
        }
    )


@pytest.fixture(scope="session")
def unet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD-1.5's kinds of blocks."""
    return save_unet(tmp_path_factory.mktemp("unet"))


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four transformer blocks with learned variance, as DiT-XL/2 has."""
    torch.manual_seed(1)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    folder = tmp_path_factory.mktemp("dit")
    random_weights(model).save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="session")
def planned_unet(unet_folder: Path) -> PlannedExport:
    """The UNet traced with a full schedule."""
    return plan_export(
        str(unet_folder), schedule_for(unet_folder), ExportOptions(timestep_tables=False, layout="variants")
    )


@pytest.fixture(scope="session")
def planned_unet_layers(unet_folder: Path) -> PlannedExport:
    """The UNet traced in pairs of resnet and attention, without guidance."""
    schedule = schedule_for(unet_folder, granularity="layer")
    return plan_export(
        str(unet_folder), schedule, ExportOptions(timestep_tables=False, layout="variants", guidance=False)
    )


@pytest.fixture(scope="session")
def planned_dit(dit_folder: Path) -> PlannedExport:
    """The transformer traced with residual caches and a full schedule."""
    return plan_export(
        str(dit_folder), schedule_for(dit_folder), ExportOptions(timestep_tables=False, layout="variants")
    )


@pytest.fixture(scope="session")
def planned_dit_output(dit_folder: Path) -> PlannedExport:
    """The transformer traced with output caches, two images a launch and no guidance."""
    options = ExportOptions(timestep_tables=False, layout="variants", batch=2, guidance=False)
    return plan_export(str(dit_folder), schedule_for(dit_folder, cache="output"), options)


@pytest.fixture(scope="session")
def planned_dit_layers(dit_folder: Path) -> PlannedExport:
    """The transformer traced in attentions and feed-forwards."""
    return plan_export(
        str(dit_folder),
        schedule_for(dit_folder, granularity="layer"),
        ExportOptions(timestep_tables=False, layout="variants"),
    )


@pytest.fixture(scope="session")
def with_gates() -> Callable[[PlannedExport, list[list[bool]]], PlannedExport]:
    """The same trace with other gates."""

    def change(planned: PlannedExport, gates: list[list[bool]]) -> PlannedExport:
        return replan(planned, planned.schedule.with_gates(gates))

    return change
