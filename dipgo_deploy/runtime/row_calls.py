"""Rows of the same settings as one call of a pipeline, and what each of its pictures is told to be made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.lora.merge import LoraReport
from dipgo_deploy.runtime.parameters import parameters_text
from dipgo_deploy.runtime.prompt_rows import PromptRow


def call_arguments(rows: Sequence[PromptRow], usual: Mapping[str, Any]) -> dict[str, Any]:
    """What the pipeline is called with for rows of the same ``settings``, a picture each; the seeds are the caller's.

    usual: arguments of the pipeline where a row has none.
    """
    first = rows[0]
    found = {**usual, "prompt": None, "class_labels": None}
    for name in ("guidance_scale", "height", "width"):
        found[name] = _of(getattr(first, name), usual.get(name))
    if first.prompt is not None:
        found["prompt"] = [row.prompt for row in rows]
    if first.class_label is not None:
        found["class_labels"] = [_label(row.class_label) for row in rows]
    negative = [_of(row.negative_prompt, usual.get("negative_prompt")) for row in rows]
    found["negative_prompt"] = None if negative[0] is None else negative
    return found


def row_parameters(
    manifest: Manifest,
    row: PromptRow,
    seed: int,
    usual: Mapping[str, Any],
    latent: Sequence[int],
    loras: Sequence[LoraReport] = (),
) -> str:
    """``parameters_text`` of one row's picture. latent: shape of its latents, height and width last."""
    scale = manifest.latent.scale or 1
    return parameters_text(
        manifest,
        prompts=() if row.prompt is None else (row.prompt,),
        negative_prompts=(_of(row.negative_prompt, usual.get("negative_prompt")) or "",),
        class_labels=() if row.class_label is None else (row.class_label,),
        seeds=(seed,),
        guidance_scale=_of(row.guidance_scale, usual.get("guidance_scale")),
        size=(latent[-1] * scale, latent[-2] * scale),
        loras=loras,
    )


def _label(value: int | str | None) -> int | str | None:
    """A name, or the number of a class; a table has numbers as text."""
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 20 else value


def _of(own: Any, usual: Any) -> Any:
    return usual if own is None else own
