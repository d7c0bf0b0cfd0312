"""The built-in models, each traced once; bundles and comparisons made from that trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from family_checks import loop_report
from PIL import Image

from dipgo_deploy.compare.report import Report
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.schedule import builders

torch.set_num_threads(1)


def _traced(model: str, cache: str | None = None) -> PlannedExport:
    target = schedule_target(model, "ddim", 10, "block", cache)  # type: ignore[arg-type]
    gates = builders.full(target.steps, len(target.blocks))
    return plan_export(model, target.schedule(gates, "full", {}), ExportOptions(layout="variants", check=False))


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
def picture() -> Image.Image:
    """To start from: of no size that is exported, not square."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((100, 80), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def compare_loop() -> Callable[[Path], Report]:
    """The whole loop of an engine directory against the supernet."""
    return partial(loop_report, prompt="a sneaker", label=7, variants=False)
