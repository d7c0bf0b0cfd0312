"""What a model family is, declared without torch: its blocks, inputs and tolerances."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dipgo_deploy.bundle.pictures import PictureUse
from dipgo_deploy.errors import UserError
from dipgo_deploy.models.defaults import class_defaults
from dipgo_deploy.models.guidance import PLAIN, Guidance
from dipgo_deploy.schedule.kinds import CacheKind, Granularity

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dipgo_deploy.sampler.kinds import Kind

_ROUNDED = (
    "every layer of a graph rounds to {} bits, which adds up over the loop; held to the model in float32, that stays "
    "below, and a wrong weight, kernel or launch does not"
)
# Of the largest value, by method.
_QUANTIZED = {"int8-weights": 1e-1, "int4-weights": 5e-1, "int8": 3e-1, "fp8": 5e-1}
_REASONS = {
    "fp32": "graphs sum in another order than the model in torch; rounding stays far below, and a wrong weight, kernel "
    "or launch does not",
    "fp16": _ROUNDED.format(11),
    "bf16": _ROUNDED.format(8),
    "int8-weights": "weights are off by up to 0.4 % of the largest of their channel, in every layer, fed back through "
    "the loop; that each weight is the nearest number is checked by itself",
    "int8": "weights and what they are times are off by up to 0.4 % of the largest, in every layer, fed back through "
    "the loop; that each weight is the nearest number is checked by itself",
    "fp8": "weights and what they are times are off by up to 6 % of themselves, in every layer, fed back through the "
    "loop; that each weight is the nearest number is checked by itself",
    "int4-weights": "weights are off by up to 7 % of the largest of their block, in every layer, fed back through "
    "the loop; that each weight is the nearest number is checked by itself",
}

ConditionSource = Literal["text", "class", "guidance", "image", "fixed"]
Side = Literal["right", "left"]


@dataclass(frozen=True)
class BlockSpec:
    """One block of a family at one granularity.

    Attributes:
        name: dotted path of the module whose output tensors are the block's boundary tensors (the last module of the
            unit); it is also the block's name in a schedule.
        modules: dotted paths of all modules that belong to this block only.
        caches: the cache kinds it supports, the default first.
        residual_inputs: for a residual cache, the names of the forward arguments of module ``name`` that its output
            tensors are residuals of, one an output in the order in which the module returns them; arguments that are
            passed by position are taken in the order of these names.
    """

    name: str
    modules: tuple[str, ...]
    caches: tuple[CacheKind, ...] = ("output",)
    residual_inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class InputSpec:
    """One input of the denoiser.

    Attributes:
        name: keyword of the model's ``forward``, or what the family's ``call`` makes of it.
        shape: ints, with the batch in front.
        dtype: ``model`` (the export's dtype), ``float32`` or ``int64``.
        role: ``latent``, ``timestep`` or ``condition`` (the same in all evaluations).
        source: where a condition comes from: ``text`` (an output of the encoded prompt; the negative prompt's for the
            unconditional half of guidance), ``class`` (class ids; the unconditional half gets ``null``), ``guidance``
            (the guidance scale, of a model distilled from it), ``image`` (a picture that the call is given, as the
            family's ``pictures`` says) or ``fixed`` (the same ``values`` in every row, such as the size of the
            picture).
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["model", "float32", "int64"]
    role: Literal["latent", "timestep", "condition"]
    source: ConditionSource | None = None
    null: int | None = None
    values: tuple[float, ...] = ()
    null_values: tuple[float, ...] = ()


@dataclass(frozen=True)
class TokenizerSpec:
    """One tokenizer of a pipeline.

    Attributes:
        attribute: of the pipeline: a tokenizer, or a processor that has one.
        length: tokens that a prompt is cut or padded to.
        ids, mask: names under which ``TextScheme.encode`` gets the ids and, where it wants one, the mask (1 = token,
            0 = padding).
        padding: the side that is padded.
        special: whether the tokenizer puts its own tokens around a text.
        plain: it gets prompts without what ``TextScheme.around`` puts around them.
    """

    attribute: str = "tokenizer"
    length: int = 77
    ids: str = "input_ids"
    mask: str | None = None
    padding: Side = "right"
    special: bool = True
    plain: bool = False

    def of(self, pipeline: Any) -> Any:
        """The tokenizer of a pipeline, None where it has none."""
        found = getattr(pipeline, self.attribute, None)
        return getattr(found, "tokenizer", found)


@dataclass(frozen=True)
class TextScheme:
    """How prompts become conditions.

    Attributes:
        length: text tokens that the denoiser sees.
        encode(pipeline, tokens): from int64 (n, length) ids and masks by name to conditions by name, (n, ...), in
            torch; it is traced for the export.
        encoders: attributes of the pipeline that ``encode`` uses.
        zeros_without_negative: a call without a negative prompt gets zeros in place of the encoded empty prompt.
        lowercase: prompts are stripped and lowered first.
        prefix: text that is then put before a prompt, but not before a negative one; the tokenizers' lengths may
            exceed ``length``, of which ``encode`` leaves that many.
        around: text before and after every prompt, negative ones too, such as a chat template's.
        removed: texts that are taken out of prompts.
        given: conditions are given with every call; what makes them is neither loaded nor exported.
        unescape: HTML entities are unescaped, and white space becomes single spaces.
    """

    length: int
    encode: Callable[[Any, Mapping[str, Tensor]], Mapping[str, Tensor]]
    tokenizers: tuple[TokenizerSpec, ...] = (TokenizerSpec(),)
    encoders: tuple[str, ...] = ("text_encoder",)
    zeros_without_negative: bool = False
    lowercase: bool = False
    prefix: str = ""
    around: tuple[str, str] = ("", "")
    removed: tuple[str, ...] = ()
    unescape: bool = False
    given: bool = False

    def has_encoders(self, pipeline: Any) -> bool:
        """Whether a pipeline holds every encoder that ``encode`` uses; ``pipeline`` may be None."""
        return not self.given and all(getattr(pipeline, name, None) is not None for name in self.encoders)


def call_with_keywords(model: nn.Module, latent: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The prediction, in the latent's extents, of a model whose conditions are keywords of its ``forward``."""
    prediction: Tensor = model(latent, timestep=timestep, return_dict=False, **conditions)[0]
    return prediction


def numbered(name: str, present: Container[str]) -> list[str]:
    """``name``, ``name_1``, ... as far as they are there."""
    found = [name] if name in present else []
    while found and (following := f"{name}_{len(found)}") in present:
        found.append(following)
    return found


def no_timestep_options(
    config: Mapping[str, Any], scheduler: Mapping[str, Any], *size_and_steps: int
) -> Mapping[str, Any]:
    """A pipeline gives ``set_timesteps`` the number of steps only."""
    return {}


def _completed(function: Callable[..., Any], defaults: Mapping[str, Any]) -> Callable[..., Any]:
    def completed(config: Mapping[str, Any], *arguments: Any, **named: Any) -> Any:
        return function({**defaults, **config}, *arguments, **named)

    return completed


@dataclass(frozen=True)
class ModelFamily:
    """A family of denoisers that share a diffusers class.

    Attributes:
        class_name: the diffusers class.
        pipelines: diffusers pipeline classes it is used by.
        models: published models, for people.
        refused: kinds of models of its class, or of its pipelines' arguments, that are refused, for people.
        component: attribute of the pipeline (``unet`` or ``transformer``).
        blocks(config, granularity): the blocks in order of execution.
        inputs(config, batch, [frames,] height, width, text_length): inputs for the latent's extents in latent pixels.
        latent_channels(config): channels of the latent; a model with more output channels (learned variance) has the
            rest dropped.
        call(model, latent, timestep, conditions): the model's prediction (B, C', [f,] h, w) from the latent
            (B, C, [f,] h, w) in the model's dtype, timestep (B,) and the conditions by ``InputSpec.name``; it may
            import torch inside.
        text(config, pipeline): how prompts are encoded, None for a model without text; with ``pipeline`` None only its
            ``length`` counts.
        guidance: whether classifier-free guidance is the default; a function tells it from the configuration and
            ``model_index.json`` (empty for a denoiser alone).
        guide: how the guided prediction is made.
        set_timesteps(config, scheduler config, [frames,] latent height, latent width, steps): what a pipeline gives
            the scheduler's ``set_timesteps`` besides the number of steps; ``config`` may be empty.
        companions: other components of the pipeline that belong to the model, with their classes; ``join(model,
            {component: module})`` makes one module of all, and their configurations are in the model's under their
            names. ``class_name`` then has their class after a ``+``.
        several: companion -> class of diffusers that holds several of them, which are in folders with a number behind
            the name (``controlnet_1``); all are joined.
        pictures: what each condition of source ``image`` has of which picture, by name.
        joined: the conditions that its pipeline joins to the latent along its channels, in order.
        image_to_image(steps, strength): the steps that a run from a picture leaves out, of all that were asked for, as
            the ``get_timesteps`` of diffusers' image-to-image pipeline has it; None where there is no such pipeline.
        starts: it only works from a picture: exports without a strength are refused.
        image_encoder: parts of the pipeline that make a condition of a picture, an encoder and what prepares pictures
            for it; where they are there, the encoder's configuration is in the model's under its name.
        adapter: the option that names a file of weights beside the folder, which makes it one of this family.
        denoisers: paths, in what ``join`` makes, of the models that make predictions in turn, by the names that the
            pipeline has for them; the blocks of each are under its path. One alone is the whole module.
        denoiser_at(index, scheduler config, timesteps): which of them the pipeline runs at each timestep; where there
            is one it is never asked.
        index: entries of ``model_index.json`` that are wanted, and refused where another family's folder has them.
        settings: entries of ``model_index.json`` that are wanted, which tell it from a family of the same pipeline.
        size_multiple(config): an open latent height or width has to be a multiple of it; None where a trace is good
            for one size only.
        pixels: the latent is the picture itself, in [-1, 1].
        packing: pixels of the VAE's latent, of each side, that one of the denoiser's holds in its channels.
        frames_per_latent: of a model of videos, whose latent has a time axis: how many frames of the video each of
            the latent's makes but the first, which makes one; where a VAE says another number, that one.
        fps: frames a second that it makes videos for.
        pixels_per_latent: pixels of the picture to one of the VAE's latent, on each side, where no VAE says.
        scales_fixed: the model is told how far pixels and frames are apart, so that its VAE has to have the two numbers
            above.
        vae_settings: settings of the pipeline's VAE that have to be so, where its configuration has them.
        kind: of the samplers it is for, where its folder has none that tells.
        float32_in_fp16: components of the pipeline that overflow in float16 and stay in float32 in a fp16 export.
        given(args, kwargs): latent, timestep and conditions by ``InputSpec.name``, of the pipeline's own call of the
            model's ``forward``, where those are not its keywords; (n, ...) each, n rows or images.
        time_embeddings(files, config, timesteps): what the denoiser makes of T timesteps alone, (T, D) and, for its
            modulation, (T, any), from its safetensors files; None where nothing asks for it.
        tolerances: dtype -> largest allowed relative error against the fp32 supernet.
        defaults: setting -> value of the class where a configuration leaves it out; None: as this project knows
            diffusers' classes.
    """

    class_name: str
    pipelines: tuple[str, ...]
    component: str
    blocks: Callable[[Mapping[str, Any], Granularity], tuple[BlockSpec, ...]]
    inputs: Callable[..., tuple[InputSpec, ...]]
    latent_channels: Callable[[Mapping[str, Any]], int]
    granularities: tuple[Granularity, ...] = ("block",)
    call: Callable[..., Tensor] = call_with_keywords
    text: Callable[[Mapping[str, Any], Any], TextScheme | None] = lambda config, pipeline: None
    guidance: bool | Callable[[Mapping[str, Any], Mapping[str, Any]], bool] = True
    guide: Guidance = PLAIN
    set_timesteps: Callable[..., Mapping[str, Any]] = no_timestep_options
    companions: Mapping[str, str] = field(default_factory=dict)
    join: Callable[..., nn.Module] = lambda model, others: model
    several: Mapping[str, str] = field(default_factory=dict)
    pictures: Mapping[str, PictureUse] = field(default_factory=dict)
    joined: tuple[str, ...] = ()
    image_to_image: Callable[[int, float], int] | None = None
    starts: bool = False
    image_encoder: tuple[str, str] | None = None
    adapter: str | None = None
    denoisers: tuple[str, ...] = ("",)
    denoiser_at: Callable[[Mapping[str, Any], Mapping[str, Any], Sequence[float]], tuple[str, ...]] | None = None
    index: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    size_multiple: Callable[[Mapping[str, Any]], int] | None = None
    pixels: bool = False
    packing: int = 1
    frames_per_latent: int | None = None
    fps: int | None = None
    pixels_per_latent: int = 8
    scales_fixed: bool = False
    vae_settings: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = "diffusion"
    float32_in_fp16: tuple[str, ...] = ()
    given: Callable[..., tuple[Tensor, Tensor, Mapping[str, Tensor]]] | None = None
    time_embeddings: Callable[[Sequence[Path], Mapping[str, Any], Sequence[float]], tuple[Any, Any]] | None = None
    # Of the largest value. fp32: another order of summation over tens of layers; fp16 (11 bits) and bf16 (8 bits):
    # rounding after every layer, fed back through the loop.
    tolerances: Mapping[str, float] = field(default_factory=lambda: {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1})
    defaults: Mapping[str, Any] | None = None
    models: str = ""
    refused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Every function that takes a configuration gets it with the class's defaults; what all refuse is refused."""
        defaults = class_defaults(self.diffusers_class) if self.defaults is None else self.defaults
        blocks, inputs, text = self.blocks, self.inputs, self.text

        def known(config: Mapping[str, Any], granularity: Granularity) -> tuple[BlockSpec, ...]:
            if granularity not in self.granularities:
                names = " and ".join(self.granularities)
                raise UserError(f"granularity {granularity!r}: {self.class_name} has {names}")
            return blocks(config, granularity)

        def sized(config: Mapping[str, Any], batch: int, *size: int, text_length: int | None = None) -> Any:
            extents, rest = size[: self.axes], size[self.axes :]
            length = rest[0] if rest else text_length
            if length is None and text(config, None) is not None:
                raise UserError(f"{self.class_name}: the number of text tokens is not known; give text_length")
            return inputs(config, batch, *extents, length)

        functions: dict[str, Callable[..., Any] | None] = {
            "blocks": known,
            "inputs": sized,
            "latent_channels": self.latent_channels,
            "text": text,
            "set_timesteps": self.set_timesteps,
            "size_multiple": self.size_multiple,
        }
        object.__setattr__(self, "defaults", defaults)
        for name, function in functions.items():
            object.__setattr__(self, name, function and _completed(function, defaults))

    def is_guided(self, config: Mapping[str, Any], index: Mapping[str, Any]) -> bool:
        """Whether a model is guided by default. index: its ``model_index.json``, empty where there is none."""
        if isinstance(self.guidance, bool):
            return self.guidance
        return self.guidance({**(self.defaults or {}), **config}, index)

    def companions_in(self, config: Mapping[str, Any]) -> dict[str, str]:
        """The companions that a configuration has: name -> class."""
        return {each: class_name for name, class_name in self.companions.items() for each in numbered(name, config)}

    def parts(self, denoiser: nn.Module) -> dict[str, Any]:
        """The pipeline's denoisers by its names for them. denoiser: as it was loaded, all of them."""
        return {name or self.component: denoiser.get_submodule(name) for name in self.denoisers}

    def denoisers_of(
        self, index: Mapping[str, Any], scheduler: Mapping[str, Any], timesteps: Sequence[float]
    ) -> tuple[str, ...]:
        """Which denoiser the pipeline runs at each timestep; nothing where it has one."""
        return () if self.denoiser_at is None else self.denoiser_at(index, scheduler, timesteps)

    @property
    def axes(self) -> int:
        """Extents of the latent behind its channels: height and width, and the frames in front of them."""
        return 2 if self.frames_per_latent is None else 3

    def tolerance(self, dtype: str, quantized: str | None = None) -> float:
        """Largest allowed relative error of graphs of this type, or with weights in fewer bits, if that allows more."""
        return max(self.tolerances[dtype], _QUANTIZED.get(quantized or "", 0.0))

    @property
    def diffusers_class(self) -> str:
        """Class of the denoiser itself: ``class_name`` without what it is a variant by."""
        return self.class_name.partition("+")[0]


def tolerance_reason(dtype: str, quantized: str | None = None) -> str:
    """Why the tolerance of graphs of this type, with weights in fewer bits, is what it is."""
    return _REASONS[quantized or dtype]
