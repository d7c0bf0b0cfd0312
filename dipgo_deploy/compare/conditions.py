"""What a reference run starts from: initial noise, the sampler's noise, and an encoded prompt or a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dipgo_deploy.runtime.noise import TorchNoise

if TYPE_CHECKING:
    import torch

    from dipgo_deploy.export.source import Source
    from dipgo_deploy.models.family import InputSpec

PROMPT = "a photo"
LABEL = 0
GUIDANCE_SCALE = 7.5


@dataclass(frozen=True)
class ReferenceInputs:
    """One batch for the supernet's loop and for the engine directory's.

    latents: float32 (B, C, h, w) unit noise. noises: the sampler's draws in order, float32 (B, C, h, w). conditions:
    forward inputs by keyword, float32 or int64, (G*B, ...), the unconditional half first. guidance_scale: None without
    guidance.
    """

    latents: torch.Tensor
    noises: tuple[torch.Tensor, ...]
    conditions: dict[str, torch.Tensor]
    guidance_scale: float | None


def reference_inputs(
    source: Source,
    specs: Sequence[InputSpec],
    sample_shape: tuple[int, int, int, int],
    *,
    noises: int,
    guidance: bool,
    guidance_scale: float | None = None,
    prompts: Sequence[str] = (PROMPT,),
    labels: Sequence[int] = (LABEL,),
    seed: int = 0,
) -> ReferenceInputs:
    """Inputs of a reference run; noise from ``seed`` as the runtime draws it.

    specs: the denoiser's condition inputs. sample_shape: (B, C, h, w). noises: how often the sampler draws.
    guidance_scale: by default the pipeline's own, or 7.5. prompts, labels: one for all images, or one each.
    """
    import torch

    stream = TorchNoise(seed)
    latents = torch.from_numpy(stream.randn(sample_shape))
    drawn = tuple(torch.from_numpy(stream.randn(sample_shape)) for _ in range(noises))
    scale = None
    if guidance:
        scale = guidance_scale if guidance_scale is not None else source.default_guidance_scale() or GUIDANCE_SCALE
    conditions = reference_conditions(source, specs, guidance=guidance, prompts=prompts, labels=labels)
    return ReferenceInputs(latents, drawn, conditions, scale)


def reference_conditions(
    source: Source, specs: Sequence[InputSpec], *, guidance: bool, prompts: Sequence[str], labels: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Forward inputs by keyword, float32 or int64, (G*B, ...) with the unconditional half first.

    An ``encoded`` input gets ``prompts`` and the empty prompt, an input with an integer null value gets ``labels`` and
    that value: one for all images, or one each. Without a text encoder an encoded prompt is unit noise that depends on
    the prompt.
    """
    import torch

    conditions = {}
    for spec in specs:
        batch = spec.shape[0] // 2 if guidance else spec.shape[0]
        if spec.null == "encoded":
            rows = [_encode(source, text, spec) for text in prompts]
            null = _encode(source, "", spec)
        else:
            rows = [torch.full((1, *spec.shape[1:]), label, dtype=torch.int64) for label in labels]
            null = torch.full((1, *spec.shape[1:]), int(spec.null or 0), dtype=torch.int64)
        given = torch.cat(rows * batch if len(rows) == 1 else rows)
        halves = [null.expand(batch, *null.shape[1:]), given] if guidance else [given]
        conditions[spec.name] = torch.cat(halves)
    return conditions


def has_text_encoder(source: Source) -> bool:
    """Whether prompts are really encoded, or stand for seeded noise."""
    return getattr(source.pipeline, "text_encoder", None) is not None


def _encode(source: Source, text: str, spec: InputSpec) -> torch.Tensor:
    """(1, L, D) float32."""
    import torch

    if not has_text_encoder(source) or source.pipeline is None:
        seed = int.from_bytes(text.encode("utf-8")[:4], "little")
        return torch.from_numpy(TorchNoise(seed).randn((1, *spec.shape[1:])))
    tokens = source.pipeline.tokenizer(
        text, padding="max_length", max_length=spec.shape[1], truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        embeddings: torch.Tensor = source.pipeline.text_encoder(tokens.input_ids)[0]
    return embeddings.float()


def as_arrays(conditions: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Conditions as host arrays, float32 or int64."""
    return {name: host(tensor) for name, tensor in conditions.items()}


def host(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as a C-ordered host array; floating point comes as float32."""
    array: np.ndarray = (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()
    return array
