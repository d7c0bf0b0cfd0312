"""Tiny engine directories to change with LoRA files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from lora_files import Engine  # noqa: E402
from tiny_engines import save_dit_pipeline, save_unet, schedule_for, write  # noqa: E402

from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export  # noqa: E402
from dipgo_deploy.export.planning import in_layout  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def planned_unet(tmp_path_factory: pytest.TempPathFactory) -> PlannedExport:
    model = save_unet(tmp_path_factory.mktemp("lora-unet") / "model")
    return plan_export(
        str(model),
        schedule_for(model, ratio=0.6),
        ExportOptions(timestep_tables=False, layout="variants", guidance=False),
    )


@pytest.fixture(scope="session")
def planned_dit(tmp_path_factory: pytest.TempPathFactory) -> PlannedExport:
    model = save_dit_pipeline(tmp_path_factory.mktemp("lora-dit") / "model", layers=2)
    return plan_export(str(model), schedule_for(model), ExportOptions(timestep_tables=False, layout="variants"))


def _engine(planned: PlannedExport, folder: Path) -> Engine:
    return Engine(Path(planned.source.name), write(planned, folder / "engine"))


def _segments(planned: PlannedExport, folder: Path) -> Engine:
    """Without components, which the other layout has."""
    return _engine(in_layout(replace(planned, options=replace(planned.options, components=False)), "segments"), folder)


@pytest.fixture(scope="session")
def unet(planned_unet: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return _engine(planned_unet, tmp_path_factory.mktemp("unet"))


@pytest.fixture(scope="session")
def dit(planned_dit: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return _engine(planned_dit, tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="session")
def unet_segments(planned_unet: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return _segments(planned_unet, tmp_path_factory.mktemp("unet-segments"))


@pytest.fixture(scope="session")
def dit_segments(planned_dit: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return _segments(planned_dit, tmp_path_factory.mktemp("dit-segments"))
