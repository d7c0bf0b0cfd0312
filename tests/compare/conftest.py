"""Engine directories exported once for all tests of a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_engines import save_dit_pipeline, save_unet, schedule_for, write

from dipgo_deploy.backends import create_backend
from dipgo_deploy.backends.base import Backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, replan
from dipgo_deploy.reference.conditions import ReferenceInputs
from dipgo_deploy.reference.load import Reference, load_reference

torch.set_num_threads(1)

Inputs = Callable[..., ReferenceInputs]


@pytest.fixture(scope="session")
def unet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_unet(tmp_path_factory.mktemp("unet"))


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dit_pipeline(tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="session")
def planned_unet(unet_folder: Path) -> PlannedExport:
    return plan_export(
        str(unet_folder), schedule_for(unet_folder), ExportOptions(timestep_tables=False, layout="variants")
    )


@pytest.fixture(scope="session")
def unet_ddim(planned_unet: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare UNet, output caches, DDIM, half of the gates removed."""
    return write(planned_unet, tmp_path_factory.mktemp("engines") / "unet-ddim")


@pytest.fixture(scope="session")
def unet_pndm(planned_unet: PlannedExport, unet_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with PNDM (one evaluation more than steps) and most gates removed."""
    planned = replan(planned_unet, schedule_for(unet_folder, ratio=0.8, seed=13, sampler="pndm"))
    return write(planned, tmp_path_factory.mktemp("engines") / "unet-pndm")


@pytest.fixture(scope="session")
def dit_residual(dit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with VAE, residual caches, learned variance, DDIM."""
    planned = plan_export(
        str(dit_folder), schedule_for(dit_folder), ExportOptions(timestep_tables=False, layout="variants")
    )
    return write(planned, tmp_path_factory.mktemp("engines") / "dit-residual")


@pytest.fixture(scope="session")
def dit_output(dit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare transformer, output caches, a sampler that draws noise, two images a launch, no guidance."""
    folder = dit_folder / "transformer"
    schedule = schedule_for(folder, cache="output", sampler="euler-a", seed=2)
    planned = plan_export(
        str(folder), schedule, ExportOptions(timestep_tables=False, layout="variants", batch=2, guidance=False)
    )
    return write(planned, tmp_path_factory.mktemp("engines") / "dit-output")


@pytest.fixture(scope="session")
def backend() -> Backend:
    return create_backend("cpu", threads=1)


@pytest.fixture(scope="session")
def inputs() -> Inputs:
    """Noise and conditions for an opened engine directory."""

    def make(bundle: Bundle, reference: Reference, **options: object) -> ReferenceInputs:
        return reference.inputs(bundle.manifest, **options)

    return make


@pytest.fixture(scope="session")
def opened() -> Callable[[Path], tuple[Bundle, Reference]]:
    """An engine directory with the model that its manifest names."""

    def open_both(engine_dir: Path) -> tuple[Bundle, Reference]:
        bundle = Bundle.open(engine_dir)
        return bundle, load_reference(bundle)

    return open_both
