from __future__ import annotations

from typing import Any

import pytest

from dipgo_deploy.models.sublayers import sublayers
from dipgo_deploy.schedule.builders import Target
from dipgo_deploy.schedule.document import BlockEntry, ModelIdentity, SamplerEntry

UNET = (
    *(f"down_blocks.{i}" for i in range(4)),
    "mid_block",
    *(f"up_blocks.{i}" for i in range(4)),
)


@pytest.fixture
def document() -> dict[str, Any]:
    """A small valid document, as plain data."""
    return {
        "format_version": 1,
        "model": {"class_name": "UNet2DConditionModel", "config_hash": "a" * 64, "granularity": "block"},
        "blocks": [{"name": name, "cache": "output"} for name in ("down_blocks.0", "mid_block", "up_blocks.0")],
        "steps": 4,
        "keep": ["111", "000", "101", "010"],
        "sampler": {"class_name": "DDIMScheduler", "config": {"beta_start": 0.1}, "num_inference_steps": 4},
        "provenance": {"method": "by hand", "parameters": {}, "tool_version": "0.1.0"},
    }


@pytest.fixture
def unet_target():
    """What a nine-block UNet needs, for T evaluations."""

    def make(steps: int = 50, names: tuple[str, ...] = UNET) -> Target:
        return Target(
            model=ModelIdentity(class_name="UNet2DConditionModel", config_hash="b" * 64, granularity="block"),
            blocks=tuple(BlockEntry(name=name, cache="output") for name in names),
            sampler=SamplerEntry(class_name="DDIMScheduler", config={}, num_inference_steps=50),
            steps=steps,
        )

    return make


@pytest.fixture
def dit_target():
    """What a DiT of ``depth`` blocks needs at granularity ``layer``, for T evaluations."""

    def make(depth: int, steps: int) -> Target:
        return Target(
            model=ModelIdentity(class_name="DiTTransformer2DModel", config_hash="c" * 64, granularity="layer"),
            blocks=tuple(
                BlockEntry(name=spec.name, cache="output")
                for spec in sublayers("transformer_blocks", depth, ("attn1", "ff"))
            ),
            sampler=SamplerEntry(class_name="DDIMScheduler", config={}, num_inference_steps=steps),
            steps=steps,
        )

    return make
