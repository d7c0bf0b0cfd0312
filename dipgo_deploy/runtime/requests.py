"""What a caller asks for, checked against an engine directory before anything runs. Pure: no graph, no file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dipgo_deploy.bundle.manifest import Manifest, TensorSpec
from dipgo_deploy.errors import UserError

OutputType = Literal["pil", "np", "latent"]
OUTPUT_TYPES: tuple[OutputType, ...] = ("pil", "np", "latent")
TEXT = "encoder_hidden_states"
CLASSES = "class_labels"


@dataclass(frozen=True)
class Asked:
    """The arguments of a call, as given."""

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    class_labels: int | str | Sequence[int | str] | None = None
    num_images_per_prompt: int = 1
    guidance_scale: float | None = None
    latents: np.ndarray | None = None
    prompt_embeds: np.ndarray | None = None
    negative_prompt_embeds: np.ndarray | None = None
    output_type: OutputType = "pil"


@dataclass(frozen=True)
class TextRequest:
    """Where the text condition comes from: of each half either prompts or embeddings (n, L, D).

    negative prompts and embeddings are both None where the bundle has no guidance.
    """

    name: str
    prompts: tuple[str, ...] | None
    embeds: np.ndarray | None
    negative_prompts: tuple[str, ...] | None
    negative_embeds: np.ndarray | None

    @property
    def count(self) -> int:
        """How many prompts (or embeddings) there are."""
        return len(self.prompts or ()) if self.embeds is None else len(self.embeds)


@dataclass(frozen=True)
class Request:
    """A checked call, everything per image: ``images`` pictures in the order prompt by prompt."""

    images: int
    guidance_scale: float
    text: TextRequest | None
    classes: np.ndarray | None
    null_class: int | None
    latents: np.ndarray | None
    output_type: OutputType


def check_request(manifest: Manifest, asked: Asked) -> Request:
    """Check a call against the manifest.

    Raises:
        UserError: anything that does not fit; the message names the argument.
    """
    conditions = {spec.name: spec for spec in manifest.conditions}
    per_prompt = asked.num_images_per_prompt
    if per_prompt < 1:
        raise UserError(f"number of images {per_prompt}: must be at least 1")
    if asked.output_type not in OUTPUT_TYPES:
        raise UserError(f"output type {asked.output_type!r}: choose one of {', '.join(OUTPUT_TYPES)}")
    if asked.output_type != "latent" and manifest.components.vae_decoder is None:
        raise UserError(
            f"output type {asked.output_type!r}: this engine directory has no VAE decoder; use output type 'latent'"
        )
    text_name = _text_condition(manifest, conditions)
    unknown = set(conditions) - {text_name, CLASSES}
    if unknown:
        raise UserError(f"condition {min(unknown)}: prompts and class labels cannot provide it; drive DenoisingLoop")
    text = _check_text(manifest, conditions.get(text_name or ""), asked)
    classes = _check_classes(manifest, CLASSES in conditions, asked)
    rows = 1
    if text is not None:
        rows = text.count
    if classes is not None:
        if text is not None and len(classes) != rows:
            raise UserError(f"class_labels: {len(classes)} given for {rows} prompts; give one for each prompt")
        rows = len(classes)
    images = rows * per_prompt
    return Request(
        images=images,
        guidance_scale=_check_guidance(manifest, asked.guidance_scale),
        text=text and _repeat_text(text, per_prompt),
        classes=None if classes is None else np.repeat(classes, per_prompt),
        null_class=manifest.components.null_class,
        latents=_check_latents(manifest, asked.latents, images),
        output_type=asked.output_type,
    )


def _text_condition(manifest: Manifest, conditions: dict[str, TensorSpec]) -> str | None:
    encoder = manifest.components.text_encoder
    if encoder is not None and encoder.output in conditions:
        return encoder.output
    return TEXT if TEXT in conditions else None


def _check_text(manifest: Manifest, spec: TensorSpec | None, asked: Asked) -> TextRequest | None:
    if spec is None:
        wants = "class labels" if any(c.name == CLASSES for c in manifest.conditions) else "no condition"
        for name in ("prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds"):
            if getattr(asked, name) is not None:
                raise UserError(f"{name}: this engine directory takes {wants}, not text; leave it out")
        return None
    if asked.prompt is not None and asked.prompt_embeds is not None:
        raise UserError("prompt and prompt_embeds: give one of them, not both")
    if asked.negative_prompt is not None and asked.negative_prompt_embeds is not None:
        raise UserError("negative_prompt and negative_prompt_embeds: give one of them, not both")
    if asked.prompt is None and asked.prompt_embeds is None:
        raise UserError("prompt: missing; give a prompt or prompt_embeds")
    if not manifest.guidance and (asked.negative_prompt is not None or asked.negative_prompt_embeds is not None):
        raise UserError("negative prompt: this engine directory was exported without guidance; leave it out")
    has_encoder = manifest.components.text_encoder is not None
    prompts = None if asked.prompt is None else _strings("prompt", asked.prompt)
    embeds = None if asked.prompt_embeds is None else _check_embeds("prompt_embeds", asked.prompt_embeds, spec)
    count = len(embeds) if prompts is None and embeds is not None else len(prompts or ())
    negative_prompts: tuple[str, ...] | None = None
    negative_embeds: np.ndarray | None = None
    if asked.negative_prompt_embeds is not None:
        negative_embeds = _check_embeds("negative_prompt_embeds", asked.negative_prompt_embeds, spec)
        negative_embeds = _one_each("negative_prompt_embeds", negative_embeds, count)
    elif manifest.guidance:
        given = "" if asked.negative_prompt is None else asked.negative_prompt
        strings = _strings("negative_prompt", given)
        if len(strings) not in (1, count):
            raise UserError(f"negative_prompt: {len(strings)} given for {count} prompts; give one, or one for each")
        negative_prompts = strings * count if len(strings) == 1 else strings
    if not has_encoder and (prompts is not None or negative_prompts is not None):
        needed = "prompt_embeds and negative_prompt_embeds" if manifest.guidance else "prompt_embeds"
        raise UserError(f"prompt: this engine directory has no text encoder; give {needed}")
    return TextRequest(spec.name, prompts, embeds, negative_prompts, negative_embeds)


def _strings(name: str, given: str | Sequence[str]) -> tuple[str, ...]:
    strings = (given,) if isinstance(given, str) else tuple(given)
    if not strings:
        raise UserError(f"{name}: an empty list; give at least one")
    for string in strings:
        if not isinstance(string, str):
            raise UserError(f"{name}: {string!r} is not text")
    return strings


def _check_embeds(name: str, embeds: np.ndarray, spec: TensorSpec) -> np.ndarray:
    wanted = spec.shape[1:]
    _check_floats(name, embeds)
    if embeds.ndim != len(spec.shape) or embeds.shape[1:] != wanted or not len(embeds):
        sizes = ", ".join(map(str, wanted))
        raise UserError(f"{name}: shape {embeds.shape}, needs (prompts, {sizes}) as this model was exported")
    return embeds.astype(np.float32)


def _one_each(name: str, rows: np.ndarray, count: int) -> np.ndarray:
    if len(rows) not in (1, count):
        raise UserError(f"{name}: {len(rows)} given for {count} prompts; give one, or one for each")
    return np.repeat(rows, count, axis=0) if len(rows) == 1 else rows


def _check_floats(name: str, array: np.ndarray) -> None:
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float16, np.float32, np.float64):
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise UserError(f"{name}: {kind}, needs a float16, float32 or float64 array")
    if not np.isfinite(array).all():
        raise UserError(f"{name}: holds NaN or infinity")


def _check_classes(manifest: Manifest, takes_classes: bool, asked: Asked) -> np.ndarray | None:
    given = asked.class_labels
    if not takes_classes:
        if given is not None:
            raise UserError("class_labels: this engine directory takes no class labels; leave them out")
        return None
    if manifest.guidance and manifest.components.null_class is None:
        raise UserError("class_labels: the manifest has guidance but no null class; export the engine directory again")
    if given is None:
        raise UserError("class_labels: missing; give class ids or names" + _some_names(manifest))
    labels = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not labels:
        raise UserError("class_labels: an empty list; give at least one")
    return np.array([_class_id(manifest, label) for label in labels], np.int64)


def _class_id(manifest: Manifest, label: int | str) -> int:
    names = manifest.components.class_labels
    if isinstance(label, str):
        by_name = {name.casefold(): number for name, number in (names or {}).items()}
        found = by_name.get(label.strip().casefold())
        if found is None:
            raise UserError(f"class_labels: no class is named {label!r}" + _some_names(manifest))
        return found
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
        raise UserError(f"class_labels: {label!r} is neither a class id nor a name")
    null = manifest.components.null_class
    allowed = set(names.values()) if names else None
    if allowed is not None and label not in allowed and label != null:
        raise UserError(f"class_labels: no class has id {label}" + _some_names(manifest))
    if label < 0 or (null is not None and label > null):
        upper = f"0 to {null}" if null is not None else "0 or more"
        raise UserError(f"class_labels: id {label} is out of range ({upper})")
    return int(label)


def _some_names(manifest: Manifest) -> str:
    names = list(manifest.components.class_labels or {})
    if not names:
        return "; this engine directory knows ids only"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"; the names are {shown}"


def _check_guidance(manifest: Manifest, given: float | None) -> float:
    if not manifest.guidance:
        if given is not None:
            raise UserError("guidance_scale: this engine directory was exported without guidance; leave it out")
        return 1.0
    scale = manifest.guidance_scale if given is None else given
    if scale is None:
        raise UserError("guidance_scale: missing, and the engine directory has no default; give one")
    # Below 1 diffusers turns guidance off, which is what 1 gives here: refuse what would not do the same.
    if not math.isfinite(scale) or scale < 1:
        raise UserError(f"guidance_scale: {scale}, must be 1 (no guidance) or more")
    return float(scale)


def _check_latents(manifest: Manifest, latents: np.ndarray | None, images: int) -> np.ndarray | None:
    if latents is None:
        return None
    _check_floats("latents", latents)
    wanted = (images, manifest.latent.channels, manifest.latent.height, manifest.latent.width)
    if latents.shape != wanted:
        raise UserError(f"latents: shape {latents.shape}, needs {wanted} (one of unit noise for each image)")
    return latents.astype(np.float32)


def _repeat_text(text: TextRequest, times: int) -> TextRequest:
    def strings(given: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if given is None else tuple(string for string in given for _ in range(times))

    def rows(given: np.ndarray | None) -> np.ndarray | None:
        return None if given is None else np.repeat(given, times, axis=0)

    return TextRequest(
        text.name, strings(text.prompts), rows(text.embeds), strings(text.negative_prompts), rows(text.negative_embeds)
    )
