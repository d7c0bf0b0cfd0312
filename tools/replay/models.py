"""The models that are replayed: the tests' own tiny ones with random weights, and the two built-in ones."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Make = Callable[[Path], Path]
# Of models whose configuration does not say them.
SIZES: Mapping[str, Mapping[str, Any]] = {
    **{name: {"height": 64, "width": 64} for name in ("chroma", "flux2", "qwenimage", "zimage")},
    "hunyuan": {"height": 32, "width": 32, "num_frames": 5},
    "ltx": {"height": 64, "width": 64, "num_frames": 9},
    "wan": {"height": 16, "width": 16, "num_frames": 5},
}


def makers() -> dict[str, Make]:
    """By name, what saves a model into an empty folder; imports torch."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    names = ("flow_pipelines", "pixart_pipelines", "sd_pipelines", "tiny_denoisers", "tiny_engines")
    flow_pipelines, pixart_pipelines, sd_pipelines, tiny_denoisers, tiny_engines = map(importlib.import_module, names)

    return {
        "sd15": sd_pipelines.save_sd15,
        "sdxl": sd_pipelines.save_sdxl,
        "controlnet": lambda folder: sd_pipelines.with_controlnet(sd_pipelines.save_sd15(folder)),
        "ddpm": lambda folder: _denoiser(tiny_denoisers.unet2d(), folder, "DDPMScheduler", clip_sample=False),
        "dit": tiny_engines.save_dit_pipeline,
        "pixart-alpha": pixart_pipelines.save_alpha,
        "pixart-sigma": pixart_pipelines.save_sigma,
        "wan": lambda folder: _denoiser(tiny_denoisers.wan_transformer(), folder, "FlowMatchEulerDiscreteScheduler"),
        **{
            name: functools.partial(_flow, getattr(tiny_denoisers, f"{name}_transformer"))
            for name in ("auraflow", "chroma", "flux2", "hunyuan", "ltx", "qwenimage", "zimage")
        },
        "sana": lambda folder: _denoiser(tiny_denoisers.sana_transformer(), folder, "FlowMatchEulerDiscreteScheduler"),
        "sd3": flow_pipelines.save_sd3,
        "sd35": lambda folder: _denoiser(
            flow_pipelines.sd35_transformer(), folder, "FlowMatchEulerDiscreteScheduler", **flow_pipelines.SD3_SCHEDULER
        ),
        "flux": flow_pipelines.save_flux,
        "flux-schnell": lambda folder: flow_pipelines.save_flux(folder, guidance=False),
    }


def _flow(make: Callable[[], Any], folder: Path) -> Path:
    return _denoiser(make(), folder, "FlowMatchEulerDiscreteScheduler")


def _denoiser(model: Any, folder: Path, scheduler: str, **settings: Any) -> Path:
    """A denoiser in a folder of its own, and the scheduler that its pipeline would bring."""
    import diffusers

    model.save_pretrained(folder)
    getattr(diffusers, scheduler)(**settings).save_pretrained(folder / "scheduler")
    return folder
