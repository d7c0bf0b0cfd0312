"""Where a checkpoint that is one file has the tensors of a pipeline's parts: CompVis', BFL's and ComfyUI's layouts."""

from __future__ import annotations

from collections.abc import Collection

DENOISER = "model.diffusion_model."
"""In front of the denoiser's names, where the file has other parts too."""
_VAE = ("first_stage_model.", "vae.")
_CLIP = {
    "text_encoder": (
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
    ),
    "text_encoder_2": (
        "conditioner.embedders.1.model.",
        "conditioner.embedders.0.model.",
        "text_encoders.clip_g.transformer.",
    ),
}
_T5 = ("text_encoders.t5xxl.transformer.",)


def prefix_in_file(names: Collection[str], part: str, class_name: str) -> str | None:
    """What the names of a part's tensors begin with in a file; empty for a file that is a denoiser's alone, None for a
    part that is not in it.

    names: of the file's tensors. part: as the pipeline has it; class_name: of the part.
    """
    if part.startswith("text_encoder"):
        known = _T5 if class_name.startswith("T5") else _CLIP.get(part, ()) if class_name.startswith("CLIP") else ()
    elif part == "vae":
        known = _VAE
    else:
        known = (DENOISER, "")
    return next((prefix for prefix in known if any(name.startswith(prefix) for name in names)), None)
