"""What a reference run starts from: initial noise, the sampler's noise, and an encoded prompt or a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.bundle.pictures import PictureUse
from dipgo_deploy.bundle.prologue import usual_class
from dipgo_deploy.bundle.prompts import prepared
from dipgo_deploy.runtime.noise import TorchNoise, loop_noise

if TYPE_CHECKING:
    import torch

    from dipgo_deploy.bundle.manifest import Manifest
    from dipgo_deploy.models.family import InputSpec
    from dipgo_deploy.reference.source import Source
    from dipgo_deploy.sampler.start import ImageStart

PROMPT = "a photo"
LABEL = 0
DEFAULT_GUIDANCE_SCALE = 7.5


@dataclass(frozen=True)
class ReferenceInputs:
    """One batch for the supernet's loop and for the engine directory's.

    Attributes:
        latents: float32 (B, C, h, w) unit noise.
        noises: the sampler's draws in order, float32 (B, C, h, w).
        conditions: forward inputs by keyword, float32 or int64, (G*B, ...), the unconditional half first.
        guidance_scale: None without guidance.
        start: where a run from a picture begins, with the latents of that.
    """

    latents: torch.Tensor
    noises: tuple[torch.Tensor, ...]
    conditions: dict[str, torch.Tensor]
    guidance_scale: float | None
    start: ImageStart | None = None


def reference_inputs(
    source: Source,
    specs: Sequence[InputSpec],
    sample_shape: tuple[int, ...],
    *,
    noises: int,
    guidance: bool,
    guidance_scale: float | None = None,
    prompts: Sequence[str] = (PROMPT,),
    labels: Sequence[int] = (LABEL,),
    seed: int = 0,
    begin: int | None = None,
) -> ReferenceInputs:
    """Inputs of a reference run; noise from ``seed`` as the runtime draws it.

    Args:
        specs: the denoiser's condition inputs.
        sample_shape: (B, C, [f,] h, w).
        noises: how often the sampler draws.
        guidance_scale: by default the pipeline's own, or 7.5.
        prompts, labels: one for all images, or one each.
        begin: of a run that starts from a picture; its latents are noise too.
    """
    import torch

    from dipgo_deploy.sampler.start import ImageStart

    noise = loop_noise(seed, sample_shape, noises, picture=begin is not None)
    start = None
    if begin is not None and noise.picture is not None:
        start = ImageStart(begin, torch.from_numpy(noise.picture))
    scale = _scale(source, guidance_scale) if guidance else None
    conditions = reference_conditions(
        source, specs, guidance=guidance, prompts=prompts, labels=labels, guidance_scale=guidance_scale
    )
    drawn = tuple(map(torch.from_numpy, noise.draws))
    return ReferenceInputs(torch.from_numpy(noise.latents), drawn, conditions, scale, start)


def reference_conditions(
    source: Source,
    specs: Sequence[InputSpec],
    *,
    guidance: bool,
    prompts: Sequence[str],
    labels: Sequence[int],
    guidance_scale: float | None = None,
) -> dict[str, torch.Tensor]:
    """Forward inputs by keyword, float32 or int64, (G*B, ...) with the unconditional half first.

    Text conditions get ``prompts`` and the empty prompt, class conditions ``labels`` and the null class: one for all
    images, or one each. Without a text encoder an encoded prompt is unit noise that depends on the prompt. A guidance
    condition is ``guidance_scale``, by default the pipeline's, or 7.5. A picture is noise in [0, 1], its latents,
    embeddings or states are unit noise, a mask is 0 or 1.
    """
    import torch

    encoded = {text: _encode(source, text, specs) for text in dict.fromkeys(prompts)}
    nothing = _encode(source, "", specs, negative=True)
    scheme = source.text
    if scheme is not None and scheme.zeros_without_negative and has_text_encoder(source):
        nothing = {name: torch.zeros_like(tensor) for name, tensor in nothing.items()}
    conditions = {}
    for spec in specs:
        batch = spec.shape[0] // 2 if guidance else spec.shape[0]
        if spec.source == "text":
            rows = [encoded[text][spec.name] for text in prompts]
            null = nothing[spec.name]
        elif spec.source == "class":
            rows = [torch.full((1, *spec.shape[1:]), label, dtype=torch.int64) for label in labels]
            null = torch.full((1, *spec.shape[1:]), int(spec.null or 0), dtype=torch.int64)
        elif spec.source == "image":
            null = _picture_noise(source.family.pictures[spec.name], (1, *spec.shape[1:]))
            rows = [null]
        else:
            row = spec.values or (_scale(source, guidance_scale),)
            null = torch.tensor(row, dtype=torch.float32).reshape(1, *spec.shape[1:])
            rows = [null.to(torch.int64) if spec.dtype == "int64" else null]
            null = torch.tensor(spec.null_values).reshape(rows[0].shape) if spec.null_values else rows[0]
        given = torch.cat(rows * batch if len(rows) == 1 else rows)
        halves = [null.expand(batch, *null.shape[1:]), given] if guidance else [given]
        conditions[spec.name] = torch.cat(halves)
    return conditions


def _picture_noise(use: PictureUse, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    stream = np.random.default_rng(0)
    if use.form in ("latents", "embeds", "states"):
        return torch.from_numpy(stream.standard_normal(shape, np.float32))
    values = stream.random(shape, np.float32)
    return torch.from_numpy(values.round() if use.form in ("mask", "first_frame") else values)


def _scale(source: Source, chosen: float | None) -> float:
    return chosen if chosen is not None else source.default_guidance_scale() or DEFAULT_GUIDANCE_SCALE


def label_of(manifest: Manifest) -> int:
    """The class that an engine directory is compared at where none is asked for."""
    usual = usual_class(manifest)
    return LABEL if usual is None else usual


def has_text_encoder(source: Source) -> bool:
    """Whether prompts are really encoded, or stand for seeded noise."""
    scheme = source.text
    return scheme is not None and scheme.has_encoders(source.pipeline)


def _encode(
    source: Source, text: str, specs: Sequence[InputSpec], *, negative: bool = False
) -> dict[str, torch.Tensor]:
    """The text conditions of one prompt, (1, ...) each, float32 or int64."""
    import torch

    texts = [spec for spec in specs if spec.source == "text"]
    if not texts:
        return {}
    scheme = source.text
    if scheme is None or not has_text_encoder(source):
        stream = TorchNoise(int.from_bytes(text.encode("utf-8")[:4], "little"))
        return {
            spec.name: torch.ones(1, *spec.shape[1:], dtype=torch.int64)
            if spec.dtype == "int64"
            else torch.from_numpy(stream.randn((1, *spec.shape[1:])))
            for spec in texts
        }
    tokens: dict[str, torch.Tensor] = {}
    for entry in scheme.tokenizers:
        tokenizer = entry.of(source.pipeline)
        given = prepared(scheme, text, negative=negative, plain=entry.plain)
        batch = tokenizer(
            as_tokenized(source.pipeline, tokenizer, given),
            padding="max_length",
            max_length=entry.length,
            # As the runtime and the pipelines do, whatever side the tokenizer's own files say (Gemma's: left).
            padding_side=entry.padding,
            add_special_tokens=entry.special,
            truncation=True,
            return_tensors="pt",
        )
        tokens[entry.ids] = batch.input_ids
        if entry.mask is not None:
            tokens[entry.mask] = batch.attention_mask
    with torch.no_grad():
        found = scheme.encode(source.pipeline, tokens)
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def as_tokenized(pipeline: Any, tokenizer: Any, prompt: str) -> str:
    """What the pipeline gives its tokenizer: a textual inversion's token stands for all of its vectors."""
    from diffusers.loaders import TextualInversionLoaderMixin

    if not isinstance(pipeline, TextualInversionLoaderMixin):
        return prompt
    return str(pipeline.maybe_convert_prompt(prompt, tokenizer))


def as_arrays(conditions: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Conditions as host arrays, float32 or int64."""
    return {name: host(tensor) for name, tensor in conditions.items()}


def host(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as a C-ordered host array; floating point comes as float32."""
    array: np.ndarray = (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()
    return array
