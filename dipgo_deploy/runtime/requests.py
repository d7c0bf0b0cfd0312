"""What a caller asks for, checked against an engine directory before anything runs. Pure: no graph, no file."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from dipgo_deploy import arguments
from dipgo_deploy.backends.storage import fits
from dipgo_deploy.bundle.manifest import ConditionSpec, Manifest, TensorDType
from dipgo_deploy.bundle.pictures import ARGUMENTS
from dipgo_deploy.bundle.shapes import Range, Sizes
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.given_pictures import check_pictures, picture_conditions
from dipgo_deploy.runtime.image import Picture, to_pictures
from dipgo_deploy.runtime.memory import machine_memory

# The condition that scales what a ControlNet adds, by the name that diffusers' pipelines give it.
CONTROL_SCALE = "controlnet_conditioning_scale"
# That of what an IP-Adapter adds.
ADAPTER_SCALE = "ip_adapter_scale"

# Characters; a prompt is cut to a few hundred tokens anyway, and more would take its tokenizer long to find.
MOST_CHARACTERS = 100_000

OutputType = Literal["pil", "np", "latent", "pt"]
OUTPUT_TYPES: tuple[OutputType, ...] = ("pil", "np", "latent", "pt")
Embeds = np.ndarray | Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Asked:
    """The arguments of a call, as given."""

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    class_labels: int | str | Sequence[int | str] | None = None
    num_images_per_prompt: int = 1
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    latents: np.ndarray | None = None
    prompt_embeds: Embeds | None = None
    negative_prompt_embeds: Embeds | None = None
    conditions: Mapping[str, np.ndarray] | None = None
    image: Picture | Sequence[Picture] | None = None
    image_latents: np.ndarray | None = None
    strength: float | None = None
    control_image: Picture | Sequence[Picture] | None = None
    control_scale: float | Sequence[float] | None = None
    mask_image: Picture | Sequence[Picture] | None = None
    ip_adapter_image: Picture | Sequence[Picture] | None = None
    ip_adapter_scale: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    output_type: OutputType = "pil"


@dataclass(frozen=True)
class TextRequest:
    """Where the text conditions come from: of each half either prompts or the conditions themselves, (n, ...) by name.

    negative prompts and embeddings are both None where the bundle has no guidance, and where the unconditional half is
    zeros.
    """

    prompts: tuple[str, ...] | None
    embeds: dict[str, np.ndarray] | None
    negative_prompts: tuple[str, ...] | None
    negative_embeds: dict[str, np.ndarray] | None

    @property
    def count(self) -> int:
        """How many prompts (or embeddings) there are."""
        return len(self.prompts or ()) if self.embeds is None else len(next(iter(self.embeds.values())))


@dataclass(frozen=True)
class Request:
    """A checked call, everything per image: ``images`` pictures in the order prompt by prompt.

    Attributes:
        size: of the latent: [frames,] height and width in latent pixels.
        guidance_scales: one for each of the model's denoisers.
        fixed: the conditions that depend on neither text nor class, (images, ...) by name.
        null: of those the unconditional half's rows, where they are others.
        encoded: pictures whose latents or embeddings are conditions, float32 (1 or prompts, H, W, 3) in [0, 1] by name.
        image: pictures to start from, float32 (1 or prompts, H, W, 3) in [0, 1].
        image_latents: or their latents (1 or prompts, C, h, w).
    """

    images: int
    size: tuple[int, ...]
    guidance_scales: tuple[float, ...]
    text: TextRequest | None
    classes: np.ndarray | None
    null_class: int | None
    fixed: dict[str, np.ndarray]
    latents: np.ndarray | None
    output_type: OutputType
    null: dict[str, np.ndarray] = field(default_factory=dict)
    encoded: dict[str, np.ndarray] = field(default_factory=dict)
    image: np.ndarray | None = None
    image_latents: np.ndarray | None = None

    @property
    def guidance_scale(self) -> float:
        """That of the first denoiser."""
        return self.guidance_scales[0]


def check_request(manifest: Manifest, asked: Asked) -> Request:
    """Check a call against the manifest.

    Raises:
        UserError: anything that does not fit; the message names the argument.
    """
    per_prompt = arguments.whole("number of images", asked.num_images_per_prompt, least=1)
    arguments.choice("output type", asked.output_type, OUTPUT_TYPES)
    if asked.output_type == "pt" and "torch" not in sys.modules:
        raise UserError("output type 'pt': gives tensors of torch, which is not imported; import torch, or use 'np'")
    manifest = _at_size(manifest, asked)
    _check_frames(manifest, asked.num_frames)
    if asked.output_type != "latent" and manifest.components.vae_decoder is None:
        raise UserError(
            f"output type {asked.output_type!r}: this engine directory has no VAE decoder; use output type 'latent'"
        )
    text = _check_text(manifest, asked)
    classes = _check_classes(manifest, class_condition(manifest) is not None, asked)
    rows = 1
    if text is not None:
        rows = text.count
    if classes is not None:
        if text is not None and len(classes) != rows:
            raise UserError(f"class_labels: {len(classes)} given for {rows} prompts; give one for each prompt")
        rows = len(classes)
    images = rows * per_prompt
    _check_memory(manifest, images)
    scale = _check_guidance(manifest, asked.guidance_scale)
    scales = _guidance_scales(manifest, scale, asked.guidance_scale_2)
    _check_strength(manifest, asked)
    fixed = _check_fixed(manifest, _with_scales(manifest, asked), images, scale)
    given: dict[str, object] = {name: getattr(asked, name) for name in ARGUMENTS}
    pictures = check_pictures(manifest, given, tuple(fixed), rows, per_prompt)
    return Request(
        images=images,
        size=manifest.latent.extents,
        guidance_scales=scales,
        text=text and _repeat_text(text, per_prompt),
        classes=None if classes is None else np.repeat(classes, per_prompt),
        null_class=manifest.components.null_class,
        fixed=fixed | pictures.rows,
        latents=_check_latents(manifest, asked.latents, images),
        output_type=asked.output_type,
        null=_null_rows(manifest, images),
        encoded=pictures.encoded,
        image=_check_image(manifest, asked, rows),
        image_latents=_check_image_latents(manifest, asked.image_latents, rows),
    )


def _at_size(manifest: Manifest, asked: Asked) -> Manifest:
    """The manifest at the size that was asked for: the usual one, or that of the latents, where nothing else is."""
    ranges, latent = manifest.sizes, manifest.latent
    given = asked.latents if asked.latents is not None else asked.image_latents
    rank = 1 + len(latent.shape)
    there = given.shape[-2:] if isinstance(given, np.ndarray) and given.ndim == rank and ranges is not None else None
    usual = manifest.usual_sizes[1:]
    extents = []
    for place, (option, given_pixels) in enumerate((("height", asked.height), ("width", asked.width))):
        pixels = None if given_pixels is None else arguments.whole(option, given_pixels, least=1)
        extent = usual[place] if there is None else int(there[place])
        allowed = Range.static(usual[place]) if ranges is None else getattr(ranges, option)
        if pixels is not None:
            scale = latent.scale
            if scale is None:
                raise UserError(f"{option} {pixels}: this engine directory has one size only; leave it out")
            if pixels % scale or pixels // scale not in allowed:
                raise UserError(f"{option} {pixels}: this engine directory takes {allowed.describe(scale)}")
            if there is not None and pixels // scale != extent:
                raise UserError(f"{option} {pixels}: the latents given are of {extent * scale}; leave one of them out")
            extent = pixels // scale
        elif extent not in allowed:
            raise UserError(f"latents: {option} {extent}, this engine directory takes {allowed.describe()}")
        extents.append(extent)
    return manifest if ranges is None else manifest.at(Sizes(ranges.batch.max, *extents))


def _check_frames(manifest: Manifest, asked: int | None) -> None:
    """The number of frames is the engine directory's."""
    if asked is None:
        return
    frames = manifest.latent.video_frames
    asked = arguments.whole("num_frames", asked, least=1)
    if frames is None:
        raise UserError(f"num_frames {asked}: this engine directory makes pictures; leave it out")
    if asked != frames:
        raise UserError(
            f"num_frames {asked}: this engine directory makes videos of {frames} frames; leave it out, or export "
            "another one with --num-frames"
        )


def _check_memory(manifest: Manifest, images: int) -> None:
    """Refuse so many pictures that what is made for each at the start would not fit the machine's memory."""
    latent = manifest.latent
    values = math.prod(latent.shape)
    each = 4 * values * (2 + manifest.plan.noises)  # initial latents, noise, results
    each += sum(spec.nbytes // max(spec.shape[0], 1) for spec in manifest.conditions)
    there = machine_memory()
    if there is not None and images * each > there:
        raise UserError(
            f"number of images {images}: {images * each / 2**30:,.1f} GiB for latents and conditions are more than this"
            f" machine's {there / 2**30:,.1f} GiB; ask for fewer at once"
        )


def text_conditions(manifest: Manifest) -> dict[str, ConditionSpec]:
    """The conditions that a prompt provides, by name."""
    return {spec.name: spec for spec in manifest.conditions if spec.source == "text"}


def classes_of(manifest: Manifest) -> tuple[int, ...]:
    """The class ids that a model of classes can draw, without the null class: those of its tables, or with names, or
    all."""
    components = manifest.components
    known = [label for label in manifest.plan.table_classes if label != components.null_class]
    known = known or sorted(set((components.class_labels or {}).values()))
    return tuple(known or range(components.null_class or components.classes or 1))


def class_condition(manifest: Manifest) -> ConditionSpec | None:
    """The condition that takes class ids."""
    return next((spec for spec in manifest.conditions if spec.source == "class"), None)


def _check_fixed(
    manifest: Manifest, conditions: Mapping[str, np.ndarray], images: int, guidance_scale: float
) -> dict[str, np.ndarray]:
    """Every other condition, from the caller or from the manifest; those of pictures from the caller alone."""
    specs = {spec.name: spec for spec in manifest.conditions if spec.source in ("fixed", "guidance", "image")}
    unknown = sorted(set(conditions) - set(specs))
    if unknown:
        known = ", ".join(sorted(specs)) or "none"
        raise UserError(f"conditions: {unknown[0]} is not one that can be given (here: {known})")
    repeated = {}
    for name, spec in specs.items():
        shape, dtype = spec.shape[1:], np.int64 if spec.dtype == "int64" else np.float32
        if name in conditions:
            rows = _numbers(f"conditions: {name}", conditions[name], spec)
            if rows.shape[1:] != shape or len(rows) not in (1, images):
                sizes = "".join(f", {extent}" for extent in shape)
                raise UserError(f"conditions: {name}: shape {rows.shape}, needs (1 or {images}{sizes})")
        elif spec.source == "image":
            continue
        else:
            values = spec.values if spec.source == "fixed" else (guidance_scale,)
            rows = np.array(values).reshape(1, *shape)
        if not fits(rows, spec.dtype):
            raise _beyond(f"conditions: {name}", rows, spec.dtype)
        repeated[name] = np.repeat(rows, images // len(rows), axis=0).astype(dtype)
    return repeated


def _null_rows(manifest: Manifest, images: int) -> dict[str, np.ndarray]:
    """What the unconditional half gets, of the conditions where it is told otherwise."""
    if not manifest.guidance:
        return {}
    specs = [spec for spec in manifest.conditions if spec.null_values]
    return {
        spec.name: np.repeat(np.array(spec.null_values, np.float32).reshape(1, *spec.shape[1:]), images, axis=0)
        for spec in specs
    }


def _numbers(label: str, values: object, spec: ConditionSpec) -> np.ndarray:
    """An array of numbers of the kind that a condition takes, from whatever numpy makes an array of."""
    try:
        rows = np.asarray(values)
    except (ValueError, TypeError, OverflowError):  # ragged lists, foreign objects
        raise arguments.wrong(label, values, "an array of numbers") from None
    if rows.dtype.kind not in ("iub" if spec.dtype == "int64" else "iuf"):
        kind = "whole numbers" if spec.dtype == "int64" else "numbers"
        raise UserError(f"{label}: an array of type {rows.dtype}, needs {kind}")
    if not rows.ndim:
        raise UserError(f"{label}: one number, needs an array (1 or images, ...)")
    return rows


def _beyond(label: str, rows: np.ndarray, dtype: TensorDType) -> UserError:
    if not np.isfinite(rows).all():
        return UserError(f"{label}: holds NaN or infinity")
    return UserError(
        f"{label}: the largest value, {np.abs(rows).max():.3g}, is beyond {dtype}, which this engine directory takes; "
        "give smaller ones, or export it with another --dtype"
    )


def _check_text(manifest: Manifest, asked: Asked) -> TextRequest | None:
    specs = text_conditions(manifest)
    if not specs:
        wants = "class labels" if class_condition(manifest) is not None else "no condition"
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
    encoder = manifest.components.text_encoder
    has_encoder = encoder is not None
    prompts = None if asked.prompt is None else _strings("prompt", asked.prompt)
    embeds = None if asked.prompt_embeds is None else _check_embeds("prompt_embeds", asked.prompt_embeds, specs)
    count = len(prompts or ()) if embeds is None else len(next(iter(embeds.values())))
    zeros = encoder is not None and encoder.zeros_without_negative and asked.negative_prompt is None
    negative_prompts: tuple[str, ...] | None = None
    negative_embeds: dict[str, np.ndarray] | None = None
    if asked.negative_prompt_embeds is not None:
        negative_embeds = _check_embeds("negative_prompt_embeds", asked.negative_prompt_embeds, specs)
        negative_embeds = {
            name: _one_each("negative_prompt_embeds", rows, count) for name, rows in negative_embeds.items()
        }
    elif manifest.guidance and not zeros:
        given = "" if asked.negative_prompt is None else asked.negative_prompt
        strings = _strings("negative_prompt", given)
        if len(strings) not in (1, count):
            raise UserError(f"negative_prompt: {len(strings)} given for {count} prompts; give one, or one for each")
        negative_prompts = strings * count if len(strings) == 1 else strings
    if not has_encoder and (prompts is not None or negative_prompts is not None):
        needed = "prompt_embeds and negative_prompt_embeds" if manifest.guidance else "prompt_embeds"
        raise UserError(f"prompt: this engine directory has no text encoder; give {needed}")
    return TextRequest(prompts, embeds, negative_prompts, negative_embeds)


def _strings(name: str, texts: str | Sequence[str]) -> tuple[str, ...]:
    strings = tuple(arguments.items(name, texts, "text, or a list of texts"))
    if not strings:
        raise UserError(f"{name}: an empty list; give at least one")
    for string in strings:
        if len(arguments.text(name, string)) > MOST_CHARACTERS:
            raise UserError(f"{name}: {len(string)} characters; give at most {MOST_CHARACTERS}")
    return strings


def _check_embeds(name: str, embeds: Embeds, specs: Mapping[str, ConditionSpec]) -> dict[str, np.ndarray]:
    """The text conditions by name, all with as many rows; a bare array is the one condition of a model with one."""
    if not isinstance(embeds, Mapping):
        if len(specs) > 1:
            raise UserError(f"{name}: this model takes {' and '.join(specs)}; give all of them by name")
        embeds = {next(iter(specs)): embeds}
    if set(arguments.mapping(name, embeds)) != set(specs):
        raise UserError(f"{name}: has {', '.join(sorted(embeds)) or 'nothing'}, needs {', '.join(sorted(specs))}")
    arrays = {}
    for key, spec in specs.items():
        rows = embeds[key]
        label = name if len(specs) == 1 else f"{name}: {key}"
        if spec.dtype == "int64":
            if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "iub":
                raise UserError(f"{label}: needs an array of whole numbers")
        else:
            _check_floats(label, rows)
        if rows.ndim != len(spec.shape) or rows.shape[1:] != spec.shape[1:] or not len(rows):
            sizes = ", ".join(map(str, spec.shape[1:]))
            raise UserError(f"{label}: shape {rows.shape}, needs (prompts, {sizes}) as this model was exported")
        if not fits(rows, spec.dtype):
            raise _beyond(label, rows, spec.dtype)
        arrays[key] = rows.astype(np.int64 if spec.dtype == "int64" else np.float32)
    if len({len(rows) for rows in arrays.values()}) > 1:
        raise UserError(f"{name}: {', '.join(f'{key} has {len(rows)} rows' for key, rows in arrays.items())}")
    return arrays


def _one_each(name: str, rows: np.ndarray, count: int) -> np.ndarray:
    if len(rows) not in (1, count):
        raise UserError(f"{name}: {len(rows)} given for {count} prompts; give one, or one for each")
    return np.repeat(rows, count, axis=0) if len(rows) == 1 else rows


def _check_floats(name: str, array: np.ndarray) -> None:
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float16, np.float32, np.float64):
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise UserError(f"{name}: {kind}, needs a float16, float32 or float64 array")


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
    labels = arguments.items("class_labels", given, "class ids or names")
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
        label = found
    if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
        raise arguments.wrong("class_labels", label, "a class id or a name")
    null, tabled = manifest.components.null_class, manifest.plan.table_classes
    if tabled and label not in tabled:
        known = ", ".join(str(known) for known in tabled if known != null)
        raise UserError(
            f"class_labels: class {label}: the engine directory was exported for {known} alone (--class-labels); give "
            "one of them, or export it again"
        )
    allowed = set(names.values()) if names else None
    if allowed is not None and label not in allowed and label != null:
        raise UserError(f"class_labels: no class has id {label}" + _some_names(manifest))
    classes = manifest.components.classes
    last = null if null is not None or classes is None else classes - 1
    if not 0 <= label <= (np.iinfo(np.int64).max if last is None else last):
        upper = f"0 to {last}" if last is not None else "0 or more, in 64 bits"
        raise UserError(f"class_labels: id {label} is out of range ({upper})")
    return int(label)


def _some_names(manifest: Manifest) -> str:
    names = list(manifest.components.class_labels or {})
    if not names:
        return "; this engine directory knows ids only"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"; the names are {shown}"


def _check_guidance(manifest: Manifest, asked: float | None) -> float:
    distilled = any(spec.source == "guidance" for spec in manifest.conditions)
    if not manifest.guidance and not distilled:
        if asked is not None:
            raise UserError("guidance_scale: this engine directory was exported without guidance; leave it out")
        return 1.0
    scale = manifest.guidance_scale if asked is None else arguments.number("guidance_scale", asked)
    if scale is None:
        raise UserError("guidance_scale: missing, and the engine directory has no default; give one")
    # Below it diffusers turns guidance off, which is what it gives here: refuse what would not do the same.
    least = manifest.guidance_off if manifest.guidance else 0.0
    if scale < least:
        what = f"{least:g} (no guidance)" if manifest.guidance else "0"
        raise UserError(f"guidance_scale: {scale}, must be {what} or more")
    return float(scale)


def _guidance_scales(manifest: Manifest, first: float, second: float | None) -> tuple[float, ...]:
    """One for each denoiser: that of the second is the first's where none is given, as in diffusers."""
    count = len(manifest.model.denoisers)
    if second is None:
        return (first,) * max(1, count)
    if count < 2:
        raise UserError("guidance_scale_2: the model of this engine directory has one denoiser; leave it out")
    if not manifest.guidance:
        raise UserError("guidance_scale_2: this engine directory was exported without guidance; leave it out")
    return first, float(arguments.number("guidance_scale_2", second))


def _check_latents(manifest: Manifest, latents: np.ndarray | None, images: int) -> np.ndarray | None:
    if latents is None:
        return None
    _check_floats("latents", latents)
    wanted = (images, *manifest.latent.shape)
    if latents.shape != wanted:
        raise UserError(f"latents: shape {latents.shape}, needs {wanted} (one of unit noise for each image)")
    if not fits(latents, "float32"):
        raise _beyond("latents", latents, "float32")
    return latents.astype(np.float32)


def _with_scales(manifest: Manifest, asked: Asked) -> Mapping[str, np.ndarray]:
    """The given conditions and the scales of ControlNets and of an IP-Adapter."""
    given = {} if asked.conditions is None else dict(arguments.mapping("conditions", asked.conditions))
    if asked.ip_adapter_scale is not None:
        if ADAPTER_SCALE not in {spec.name for spec in manifest.conditions}:
            raise UserError("ip_adapter_scale: this engine directory has no IP-Adapter; leave it out")
        given[ADAPTER_SCALE] = np.array([arguments.number("ip_adapter_scale", asked.ip_adapter_scale)])
    if asked.control_scale is None:
        return given
    names = [spec.name for spec in manifest.conditions if spec.name.startswith(CONTROL_SCALE)]
    if not names:
        raise UserError("control_scale: this engine directory has no ControlNet; leave it out")
    scales = asked.control_scale if isinstance(asked.control_scale, (list, tuple)) else [asked.control_scale]
    if len(scales) not in (1, len(names)):
        raise UserError(f"control_scale: {len(scales)} given for {len(names)} ControlNets; give one, or one for each")
    numbers = [arguments.number("control_scale", scale) for scale in scales] * (len(names) // len(scales))
    return given | {name: np.array([number]) for name, number in zip(names, numbers, strict=True)}


def _check_strength(manifest: Manifest, asked: Asked) -> None:
    """A picture is given exactly where the engine directory starts from one, and its strength is that one's."""
    strength = manifest.sampler.strength
    if strength is None:
        followed = any(spec.picture.argument == "image" for spec in picture_conditions(manifest))
        for name in (*(() if followed else ("image",)), "image_latents", "strength"):
            if getattr(asked, name) is not None:
                raise UserError(
                    f"{name}: this engine directory starts from noise alone; "
                    "export it with --strength (such as 0.6) to start from a picture"
                )
        return
    if asked.image is not None and asked.image_latents is not None:
        raise UserError("image and image_latents: give one of them, not both")
    if asked.image is None and asked.image_latents is None:
        raise UserError(f"image: missing; this engine directory starts from a picture (strength {strength:g})")
    if asked.strength is not None and arguments.number("strength", asked.strength) != strength:
        raise UserError(
            f"strength: {asked.strength:g}, but this engine directory was exported for {strength:g}; "
            "leave it out or export another one"
        )


def _check_image(manifest: Manifest, asked: Asked, rows: int) -> np.ndarray | None:
    if asked.image is None or manifest.sampler.strength is None:
        return None
    encoder = manifest.components.vae_encoder
    if encoder is None:
        raise UserError("image: this engine directory has no VAE encoder; give image_latents")
    _, height, width, _ = encoder.inputs[0].shape
    pictures = to_pictures(asked.image, height, width)
    if len(pictures) not in (1, rows):
        raise UserError(f"image: {len(pictures)} given for {rows} prompts; give one, or one for each")
    return pictures


def _check_image_latents(manifest: Manifest, latents: np.ndarray | None, rows: int) -> np.ndarray | None:
    if latents is None:
        return None
    _check_floats("image_latents", latents)
    wanted = manifest.latent.shape
    if latents.shape[1:] != wanted or len(latents) not in (1, rows):
        sizes = ", ".join(map(str, wanted))
        raise UserError(f"image_latents: shape {latents.shape}, needs (1 or {rows}, {sizes})")
    if not fits(latents, "float32"):
        raise _beyond("image_latents", latents, "float32")
    return latents.astype(np.float32)


def _repeat_text(text: TextRequest, times: int) -> TextRequest:
    def strings(texts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if texts is None else tuple(string for string in texts for _ in range(times))

    def rows(arrays: dict[str, np.ndarray] | None) -> dict[str, np.ndarray] | None:
        return None if arrays is None else {name: np.repeat(array, times, axis=0) for name, array in arrays.items()}

    return TextRequest(
        strings(text.prompts), rows(text.embeds), strings(text.negative_prompts), rows(text.negative_embeds)
    )
