"""The built-in models, each traced once; bundles and comparisons made from that trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dipgo_deploy.backends import create_backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.compare.conditions import reference_inputs
from dipgo_deploy.compare.engine import Options, compare_engine
from dipgo_deploy.compare.reference import load_reference
from dipgo_deploy.compare.report import Report
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.schedule import builders

torch.set_num_threads(1)


def _traced(model: str, cache: str | None = None) -> PlannedExport:
    target = schedule_target(model, "ddim", 10, "block", cache)  # type: ignore[arg-type]
    gates = builders.full(target.steps, len(target.blocks))
    return plan_export(model, target.schedule(gates, "full", {}), ExportOptions(check=False))


@pytest.fixture(scope="session")
def fashion_sd() -> PlannedExport:
    """The UNet with output caches."""
    return _traced("fashion-sd")


@pytest.fixture(scope="session")
def fashion_dit() -> PlannedExport:
    """The transformer with residual caches."""
    return _traced("fashion-dit")


@pytest.fixture(scope="session")
def fashion_dit_output() -> PlannedExport:
    """The transformer with output caches."""
    return _traced("fashion-dit", "output")


@pytest.fixture(scope="session")
def compare_loop() -> Callable[[Path], Report]:
    """The whole loop of an engine directory against the supernet."""

    def compare(engine_dir: Path, prompt: str = "a sneaker", label: int = 7) -> Report:
        bundle = Bundle.open(engine_dir)
        manifest = bundle.manifest
        reference = load_reference(bundle)
        latent = manifest.latent
        inputs = reference_inputs(
            reference.source,
            reference.conditions,
            (manifest.batch, latent.channels, latent.height, latent.width),
            noises=manifest.plan.noises,
            guidance=manifest.guidance,
            guidance_scale=manifest.guidance_scale,
            prompts=(prompt,),
            labels=(label,),
        )
        backend = create_backend("cpu", threads=1)
        return compare_engine(bundle, reference, inputs, backend, Options(variants=False))

    return compare
