"""Nodes for ComfyUI: one opens an engine directory, one draws from it.

A folder in ComfyUI's ``custom_nodes`` whose ``__init__.py`` imports both mappings of this module makes them known.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dipgo_deploy.backends import BACKENDS
from dipgo_deploy.bundle.manifest import MANIFEST_NAME
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.runtime.requests import class_condition, text_conditions

_PIPELINE = "DIPGO_PIPELINE"
# As ComfyUI's own samplers have it.
_MOST_SEED = 2**64 - 1


class LoadEngines:
    """An engine directory, opened."""

    CATEGORY = "dipgo"
    FUNCTION = "load"
    RETURN_TYPES = (_PIPELINE,)
    RETURN_NAMES = ("pipeline",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, ComfyUI's name
        """What the node takes."""
        return {
            "required": {
                "engine_dir": ("STRING", {"default": "engines/sd", "tooltip": "made by dipgo-export"}),
                "backend": (list(BACKENDS), {"default": BACKENDS[0]}),
            },
            "optional": {
                "schedule": ("STRING", {"default": "", "tooltip": "of a directory with several; empty: its first"}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, engine_dir: str, backend: str, schedule: str = "") -> float:  # noqa: N802, ComfyUI's name
        """When the directory was written: one that was exported again is opened again."""
        manifest = Path(engine_dir) / MANIFEST_NAME
        return manifest.stat().st_mtime if manifest.is_file() else float("nan")

    def load(self, engine_dir: str, backend: str, schedule: str = "") -> tuple[Pipeline]:
        """The pipeline; its graphs are loaded at the first picture. Raises UserError as ``from_engine_dir``."""
        return (Pipeline.from_engine_dir(engine_dir, backend, schedule=schedule or None, load="call"),)


class DrawWithEngines:
    """Pictures, or the frames of videos, from prompt to picture."""

    CATEGORY = "dipgo"
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE",)
    _PICTURES: ClassVar[dict[str, str]] = {
        "image": "IMAGE",
        "mask_image": "MASK",
        "control_image": "IMAGE",
        "ip_adapter_image": "IMAGE",
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, ComfyUI's name
        """What the node takes."""
        text = {"default": "", "multiline": True}
        guidance = {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": "0: the engine directory's"}
        return {
            "required": {
                "pipeline": (_PIPELINE,),
                "prompt": ("STRING", {**text, "tooltip": "or the class, of a model of classes"}),
                "negative_prompt": ("STRING", text),
                "seed": ("INT", {"default": 0, "min": 0, "max": _MOST_SEED, "control_after_generate": True}),
                "guidance_scale": ("FLOAT", guidance),
                "count": ("INT", {"default": 1, "min": 1, "max": 4096}),
            },
            "optional": {name: (kind,) for name, kind in cls._PICTURES.items()},
        }

    def draw(
        self,
        pipeline: Pipeline,
        prompt: str,
        negative_prompt: str,
        seed: int,
        guidance_scale: float,
        count: int,
        **pictures: Any,
    ) -> tuple[Any]:
        """A tensor (count [* frames], H, W, 3) in [0, 1].

        Raises:
            UserError: as the pipeline; whatever ComfyUI raises when its user stops it.
        """
        import torch

        manifest = pipeline.bundle.manifest
        call: dict[str, Any] = {
            name: _array(name, picture) for name, picture in pictures.items() if picture is not None
        }
        if text_conditions(manifest):
            call["prompt"] = prompt
        elif class_condition(manifest) is not None:
            call["class_labels"] = int(prompt) if prompt.strip().isdecimal() else prompt.strip()
        if negative_prompt:
            call["negative_prompt"] = negative_prompt
        if guidance_scale:
            call["guidance_scale"] = guidance_scale
        output = pipeline(seed=seed, num_images_per_prompt=count, output_type="np", callback=_progress(), **call)
        images = np.ascontiguousarray(output.images, np.float32)
        return (torch.from_numpy(images.reshape(-1, *images.shape[-3:])),)


def _array(name: str, pictures: Any) -> np.ndarray:
    """One of ComfyUI's pictures (1, H, W, 3) or masks (1, H, W); raises UserError for a batch of several."""
    array: np.ndarray = pictures.cpu().numpy()
    if len(array) != 1:
        raise UserError(f"{name}: a batch of {len(array)}; give one picture")
    return array[0]


def _progress() -> Callable[[int, int], None] | None:
    """Moves ComfyUI's bar, and stops where its user does; None outside of ComfyUI."""
    try:
        utils, management = import_module("comfy.utils"), import_module("comfy.model_management")
    except ImportError:
        return None
    bars: list[Any] = []

    def launched(done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        if not bars:
            bars.append(utils.ProgressBar(total))
        bars[0].update_absolute(done, total)

    return launched


NODE_CLASS_MAPPINGS = {"DipgoLoadEngines": LoadEngines, "DipgoDraw": DrawWithEngines}
NODE_DISPLAY_NAME_MAPPINGS = {"DipgoLoadEngines": "Load engines (dipgo)", "DipgoDraw": "Draw with engines (dipgo)"}
