"""Tiny engine directories to change with LoRA files."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from lora_files import Engine  # noqa: E402
from tiny_engines import save_dit_pipeline, save_unet, schedule_for, write  # noqa: E402

from dipgo_deploy.export.exporter import ExportOptions, plan_export  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("lora-unet")
    model = save_unet(folder / "model")
    planned = plan_export(str(model), schedule_for(model, ratio=0.6), ExportOptions(guidance=False))
    return Engine(model, write(planned, folder / "engine"))


@pytest.fixture(scope="session")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("lora-dit")
    model = save_dit_pipeline(folder / "model", layers=2)
    planned = plan_export(str(model), schedule_for(model), ExportOptions())
    return Engine(model, write(planned, folder / "engine"))
