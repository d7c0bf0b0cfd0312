"""What a picture was made with, as text in the picture's file, in the form that people's tools read ("parameters")."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePath

from dipgo_deploy._version import __version__
from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.lora.merge import LoraReport


def parameters_text(
    manifest: Manifest,
    *,
    prompts: Sequence[str] = (),
    negative_prompts: Sequence[str] = (),
    class_labels: Sequence[int | str] = (),
    seeds: Sequence[int],
    guidance_scale: float | None,
    size: tuple[int, int],
    loras: Sequence[LoraReport] = (),
) -> str:
    """Prompts, then negative prompts, then one line of ``name: value`` with commas between, as AUTOMATIC1111 writes it.

    Args:
        manifest: of the engine directory.
        prompts, negative_prompts: one a line.
        class_labels: of a class model.
        seeds: one of all pictures, or one for each.
        guidance_scale: None: the directory's own.
        size: width and height in pixels.
        loras: what was added to the weights.
    """
    lines = list(prompts)
    if any(negative_prompts):
        first, *rest = negative_prompts
        lines += [f"Negative prompt: {first}", *rest]
    sampler, plan = manifest.sampler, manifest.plan
    scale = manifest.guidance_scale if guidance_scale is None else guidance_scale
    values = {
        "Class": ", ".join(map(str, class_labels)),
        "Steps": sampler.num_inference_steps,
        "Sampler": sampler.class_name,
        "CFG scale": "" if scale is None else f"{scale:g}",
        "Seed": ", ".join(map(str, seeds)),
        "Size": f"{size[0]}x{size[1]}",
        "Model": manifest.model.name,
        "Denoising strength": "" if sampler.strength is None else f"{sampler.strength:g}",
        "Lora": ", ".join(f"{PurePath(lora.file).name}:{lora.scale:g}" for lora in loras),
        "Schedule": manifest.name,
        "Launches": len(plan.launched),
        "Version": f"dipgo_deploy {__version__}",
    }
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items() if value != ""))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """In JSON's quotes where it has a mark that the line itself uses."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value
