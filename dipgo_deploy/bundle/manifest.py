"""The manifest: everything a runtime needs to know about an engine directory, without loading a graph."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic

from dipgo_deploy import documents
from dipgo_deploy.bundle.history import History
from dipgo_deploy.bundle.pictures import PictureUse
from dipgo_deploy.bundle.quantized import Method
from dipgo_deploy.bundle.shapes import NAMES, Dim, SizeRanges, Sizes, evaluate, evaluate_shape
from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.guidance import HALVES, Half
from dipgo_deploy.schedule.validation import one_line

FORMAT_VERSION = 4
# What is written where launches have the weights of a forecast, which earlier releases would not know.
FORECAST_VERSION = 5
# What is written where graphs take rows of tables.
TABLES_VERSION = 6
# What is written where graphs take rows that are made at the start of a run.
RUN_ROWS_VERSION = 7
# What is written where a model has several denoisers.
DENOISERS_VERSION = 8
# What is written where a directory has several schedules.
SEVERAL_VERSION = 9
# What is written where weights are in fewer bits.
QUANTIZED_VERSION = 10
# What is written where a launch has another guidance than the run's.
GUIDANCE_VERSION = 11
# What is written where the halves of guidance are launched one after the other.
HALVES_VERSION = 12
# What is read too: directories without a seal, of which nobody can tell whether the manifest was changed.
UNSEALED_VERSION = 3
MANIFEST_NAME = "manifest.json"
SCHEDULE_NAME = "schedule.json"
# A thousand launches of a sampler that draws noise at each have two million coefficients.
EXPORT_AGAIN = "export the engine directory again"
MAX_MANIFEST_BYTES = 64 * 2**20
MAX_MANIFEST_VALUES = 5_000_000

T = TypeVar("T")

_log = logging.getLogger(__name__)
# The first mistake of a list ends its check: the errors of a long list would take more memory than the list.
Many = Annotated[tuple[T, ...], pydantic.FailFast()]

DType = Literal["fp32", "fp16", "bf16"]
TensorDType = Literal["float32", "float16", "bfloat16", "int64"]
Layout = Literal["variants", "segments"]
NUMPY_DTYPES: dict[str, str] = {"float32": "float32", "float16": "float16", "int64": "int64"}
ITEM_SIZES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}


class _Frozen(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


def _is_none(value: object) -> bool:
    return value is None


def _is_one(value: float) -> bool:
    return value == 1


def _is_zero(value: int) -> bool:
    return value == 0


def _is_right(value: str) -> bool:
    return value == "right"


def _is_control(value: PictureUse) -> bool:
    return value == PictureUse()


def _is_blank(value: Sequence[str]) -> bool:
    return not any(value)


def _is_false(value: bool) -> bool:
    return not value


def _is_empty(value: Sized) -> bool:
    return not len(value)


class TensorSpec(_Frozen):
    """Name, shape and dtype of a graph input or output.

    A tensor whose shape depends on batch, height or width has ``dims`` too; ``shape`` is then the largest.
    """

    name: str
    shape: Many[int]
    dtype: TensorDType
    dims: tuple[Dim, ...] | None = pydantic.Field(
        default=None,
        exclude_if=_is_none,
        description="the shape with expressions over batch, height and width (latent pixels), such as `2*batch`",
    )

    @pydantic.field_validator("dims")
    @classmethod
    def _readable(cls, dims: tuple[Dim, ...] | None) -> tuple[Dim, ...] | None:
        for dim in dims or ():
            if isinstance(dim, str):
                evaluate(dim, dict.fromkeys(NAMES, 2**20))
        return dims

    @property
    def declared(self) -> tuple[Dim, ...]:
        """The shape that the graph itself declares."""
        return self.shape if self.dims is None else self.dims

    def at(self, sizes: Sizes) -> Self:
        """With the shape that it has at ``sizes``."""
        return self if self.dims is None else self.model_copy(update={"shape": evaluate_shape(self.dims, sizes)})

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * ITEM_SIZES[self.dtype]


class ConditionSpec(TensorSpec):
    """A condition of the denoiser: an input that is the same in all launches of a run, and what fills it."""

    source: Literal["text", "class", "guidance", "image", "fixed"] = pydantic.Field(
        description="text: output of the text encoder of this name; class: class ids; guidance: the guidance scale; "
        "image: a picture, as `picture` says; fixed: `values` in every row"
    )
    picture: PictureUse = pydantic.Field(
        default=PictureUse(), exclude_if=_is_control, description="of source image: what it has of which picture"
    )
    values: Many[float] = pydantic.Field(default=(), description="one row, flattened, of a fixed condition")
    null_values: Many[float] = pydantic.Field(
        default=(),
        exclude_if=_is_empty,
        description="one row of the unconditional half, where it is another (an aesthetic score)",
    )
    expressions: tuple[float | str, ...] | None = pydantic.Field(
        default=None, exclude_if=_is_none, description="the values with expressions, where they depend on the size"
    )

    @pydantic.field_validator("expressions")
    @classmethod
    def _values_readable(cls, expressions: tuple[float | str, ...] | None) -> tuple[float | str, ...] | None:
        for expression in expressions or ():
            if isinstance(expression, str):
                evaluate(expression, dict.fromkeys(NAMES, 2**20))
        return expressions

    def at(self, sizes: Sizes) -> Self:
        """With the shape and the values that it has at ``sizes``."""
        spec = super().at(sizes)
        if self.expressions is None:
            return spec
        given = sizes._asdict()
        values = tuple(float(evaluate(v, given)) if isinstance(v, str) else v for v in self.expressions)
        return spec.model_copy(update={"values": values})


class Graph(_Frozen):
    """One ONNX file of the directory (path relative to it) with its inputs and outputs in graph order."""

    file: str
    inputs: Many[TensorSpec]
    outputs: Many[TensorSpec]
    sizes: SizeRanges | None = pydantic.Field(
        default=None, exclude_if=_is_none, description="the manifest's, where a shape depends on them"
    )

    def at(self, sizes: Sizes) -> Graph:
        """With the shapes that it has at ``sizes``; what it declares and its ranges stay."""
        if self.sizes is None:
            return self
        tensors = {name: tuple(spec.at(sizes) for spec in getattr(self, name)) for name in ("inputs", "outputs")}
        return self.model_copy(update=tensors)


class VariantEntry(_Frozen):
    """One denoiser variant: its graph, which inputs and outputs are caches (in arena binding order), and its MACs."""

    name: str
    graph: Graph
    reads: Many[str] = pydantic.Field(description="graph input names bound to the cache arena, in order")
    writes: Many[str] = pydantic.Field(description="graph output names bound to the cache arena, in order")
    predicts: bool
    macs: int


class LaunchEntry(_Frozen):
    """One launch, in the order of the run."""

    step: int = pydantic.Field(description="evaluation index, 0-based")
    variant: int
    timestep: float
    coefficients: Many[float] = pydantic.Field(
        description="weights of the history's slots: the model's latent input; empty where the graph takes no stack"
    )
    reads: Many[int] = pydantic.Field(description="arena byte offsets, in the order of the variant's reads")
    writes: Many[int] = pydantic.Field(description="arena byte offsets, in the order of the variant's writes")
    slot: int | None = pydantic.Field(description="slot of the history that the prediction is written to")
    forecast: Many[float] = pydantic.Field(
        default=(),
        exclude_if=_is_empty,
        description="weights of stored values: of the variant's reads whose name ends in @N, or of all reads of a "
        "segment that is a weighted sum; empty where the graph takes none",
    )
    denoiser: int = pydantic.Field(
        default=0, exclude_if=_is_zero, description="whose launch it is, of the model's denoisers"
    )
    guidance: float = pydantic.Field(
        default=1.0,
        exclude_if=_is_one,
        description="how much of the run's guidance it has: its scale is off + guidance * (scale - off) with the "
        "manifest's `guidance_off`; 0: it is conditional only, with half the batch, and of a cache that a guided "
        "launch wrote it reads the second half, unless it has a `half`",
    )
    half: Half | None = pydantic.Field(
        default=None,
        exclude_if=_is_none,
        description="of guidance in two launches: whose rows it has of conditions and of what is made at the start of "
        "a run, `unconditional` the first half and `conditional` the second; none for a launch that makes the guided "
        "prediction, whose graph reads `unconditional` and `conditional`",
    )
    passes: int | None = pydantic.Field(
        default=None,
        exclude_if=_is_none,
        description="arena byte offset that its prediction is written to, for the launch that makes the guided one",
    )

    @property
    def reads_second_halves(self) -> bool:
        """Whether it may read the second half of what lies in the arena."""
        return self.guidance == 0 and self.half is None


class PlanEntry(_Frozen):
    """The loop: variants, launches, the history and the cache arena.

    In the layout ``variants`` each graph is a whole evaluation; in ``segments`` it is a part of one (or a sum of
    tensors), an evaluation is several launches with the same ``step``, and the arena also holds what parts pass on.

    The history is float32 (slots, batch, channels, [frames,] height, width): slot 0 is the initial noise, then the
    predictions, then ``spare`` slots, then the picture's latents where the run starts from one, then ``noises`` noise
    draws in the order in which the sampler draws them. Graphs take the weights of a launch as
    ``bundle.history.graph_coefficients`` makes them.
    """

    layout: Layout = "variants"
    variants: Many[VariantEntry]
    launches: Many[LaunchEntry]
    final: Many[float] = pydantic.Field(description="weights of the history's slots: the final latent")
    slots: int
    noises: int
    spare: int = pydantic.Field(
        default=0,
        ge=0,
        exclude_if=_is_zero,
        description="slots behind the predictions that nothing fills, so that graphs are those of a schedule of "
        "the same directory with more predictions",
    )
    image_slot: int | None = pydantic.Field(
        default=None, exclude_if=_is_none, description="slot of the picture's latents, of a run that starts from one"
    )
    table_timesteps: Many[float] = pydantic.Field(
        default=(),
        exclude_if=_is_empty,
        description="timesteps of the rows in `tables.safetensors` beside the graphs; graphs take the row of a "
        "launch's timestep as their inputs `table.NAME`",
    )
    table_classes: Many[int] = pydantic.Field(
        default=(),
        exclude_if=_is_empty,
        description="classes of the tables `run.NAME` in `tables.safetensors`, (classes, timesteps, *row of an image); "
        "graphs take the rows of a run's classes and a launch's timestep as their inputs `run.NAME`; a run can have no "
        "other class",
    )
    prologue: Graph | None = pydantic.Field(
        default=None,
        exclude_if=_is_none,
        description="graph that runs before the launches of a run with other conditions: conditions -> `run.NAME`, "
        "with the timesteps of the tables in front where it depends on the timestep",
    )
    arena_bytes: int
    lower_bound_bytes: int
    macs_full: int
    macs_schedule: int
    macs_run: int
    evaluations: int

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """Those of the variants, and the prologue's."""
        return (*(variant.graph for variant in self.variants), *(() if self.prologue is None else (self.prologue,)))

    @property
    def history(self) -> History:
        """What the graphs know of the history."""
        return History(self.slots, self.slots - self.noises - (self.image_slot is not None))

    @property
    def halves(self) -> tuple[Half | None, ...]:
        """What launches have of the batch of guidance: None for all of it, or one half after the other."""
        return HALVES if any(launch.half for launch in self.launches) else (None,)

    @property
    def one_launch_each(self) -> bool:
        """Whether an evaluation is one launch, which can be run by itself."""
        return self.layout == "variants" and self.halves == (None,)

    @property
    def launched(self) -> tuple[int, ...]:
        """The evaluations that have launches, in order."""
        return tuple(dict.fromkeys(launch.step for launch in self.launches))


class Calibration(_Frozen):
    """What activations in 8 bits were fitted to, and how far that is from floats."""

    prompts: Many[str] = pydantic.Field(description="of the runs that were recorded; empty for other models")
    samples: int = pydantic.Field(description="how many runs were recorded, of seeds 0, 1, ...")
    budget: float = pydantic.Field(description="the error that was allowed")
    error: float = pydantic.Field(
        description="root mean square of the difference over that of the value, of the output that is off most, in the "
        "recorded launches, each with the floats' inputs"
    )
    sensitivity: dict[str, float] = pydantic.Field(description="the same with one block alone in 8 bits, by its name")
    kept: Many[str] = pydantic.Field(description="blocks that stay as they are, for the budget's sake")


class QuantizationEntry(_Frozen):
    """What of the denoiser's graphs is in fewer bits."""

    method: Method
    block_size: int | None = pydantic.Field(
        default=None, description="inputs of a channel that share a scale, of weights in 4 bits"
    )
    weights: int = pydantic.Field(description="how many weights are in fewer bits")
    bytes_before: int = pydantic.Field(description="that they take in the type of the graphs")
    bytes_after: int = pydantic.Field(description="that they take with their scales")
    kept: Many[str] = pydantic.Field(
        default=(), description="weights of products, of 1024 values or more, that stay as they are"
    )
    calibration: Calibration | None = pydantic.Field(
        default=None, exclude_if=_is_none, description="of methods that round activations, int8 and fp8"
    )

    @property
    def line(self) -> str:
        """What was done, in a line."""
        before, after = (f"{nbytes / 2**20:.1f}" for nbytes in (self.bytes_before, self.bytes_after))
        line = f"{self.method}: {self.weights} weights take {after} MiB in place of {before}"
        calibration = self.calibration
        if calibration is None:
            return line + (f"; {len(self.kept)} stay as they are: {', '.join(self.kept)}" if self.kept else "")
        line += f"; launches are off by {calibration.error:.1%} (root mean square)"
        names = ", ".join(calibration.kept)
        blocks = f"{len(calibration.kept)} of {len(calibration.sensitivity)} blocks stay as they are: {names}"
        return f"{line}; {blocks}" if calibration.kept else line


class ModelEntry(_Frozen):
    """Identity of the exported denoiser."""

    class_name: str
    name: str
    config_hash: str
    granularity: Literal["block", "layer"]
    config: dict[str, Any]
    denoisers: Many[str] = pydantic.Field(
        default=(),
        exclude_if=_is_empty,
        description="names of the denoisers that take turns; empty where the model is one",
    )


class SamplerEntry(_Frozen):
    """The diffusers scheduler that the coefficients were taken from."""

    class_name: str
    config: dict[str, Any]
    num_inference_steps: int
    set_timesteps: dict[str, Any] = pydantic.Field(
        default_factory=dict, description="further arguments of the scheduler's set_timesteps"
    )
    strength: float | None = pydantic.Field(
        default=None, exclude_if=_is_none, description="image-to-image: share of the steps that are run"
    )
    begin: int | None = pydantic.Field(
        default=None,
        exclude_if=_is_none,
        description="image-to-image: evaluation of the full run (row of the schedule) that is evaluation 0 here",
    )


class TokenizerEntry(_Frozen):
    """A tokenizer: a prompt -> token ids int64 (1, length), padded with ``pad_id``, and a mask of the same shape."""

    file: str = pydantic.Field(description="relative to the engine directory")
    length: int
    pad_id: int
    ids: str = pydantic.Field(description="input of the text encoder's graph that takes the token ids")
    mask: str | None = pydantic.Field(default=None, description="input that takes 1 for tokens and 0 for padding")
    padding: Literal["right", "left"] = pydantic.Field(
        default="right", exclude_if=_is_right, description="the side that is padded"
    )
    plain: bool = pydantic.Field(
        default=False, exclude_if=_is_false, description="whether it gets prompts without what is put around them"
    )
    special: bool = pydantic.Field(
        default=True, exclude_if=bool, description="whether the tokenizer puts its own tokens around a text"
    )
    expansions: dict[str, str] = pydantic.Field(
        default_factory=dict,
        exclude_if=_is_empty,
        description="token of a textual inversion with several vectors -> what stands in its place in a prompt",
    )


class TextEncoderEntry(_Frozen):
    """All text encoders of a model as one graph: token ids -> conditions, (1, ...) each, named as the denoiser's."""

    graph: Graph
    tokenizers: Many[TokenizerEntry]
    zeros_without_negative: bool = pydantic.Field(
        default=False, description="without a negative prompt the unconditional half is zeros"
    )
    lowercase: bool = pydantic.Field(default=False, description="prompts are stripped and lowered first")
    prefix: str = pydantic.Field(default="", description="then put before each prompt, but no negative one")
    around: tuple[str, str] = pydantic.Field(
        default=("", ""), exclude_if=_is_blank, description="then put before and after every prompt, negative ones too"
    )
    removed: Many[str] = pydantic.Field(
        default=(), exclude_if=_is_empty, description="texts that are taken out of prompts first"
    )
    unescape: bool = pydantic.Field(
        default=False,
        exclude_if=_is_false,
        description="then HTML entities are unescaped, and white space becomes single spaces",
    )


class LatentSpec(_Frozen):
    """Shape of the latent (without the batch)."""

    channels: int
    frames: int | None = pydantic.Field(
        default=None, exclude_if=_is_none, description="extent of the time axis, of a model of videos"
    )
    height: int
    width: int
    scale: int | None = pydantic.Field(
        default=None, exclude_if=_is_none, description="pixels of the picture to one latent pixel, on each side"
    )
    time_scale: int | None = pydantic.Field(
        default=None,
        exclude_if=_is_none,
        description="frames of the video to one of the latent; the first one of the latent makes one",
    )
    fps: int | None = pydantic.Field(
        default=None, exclude_if=_is_none, description="frames a second that the model makes videos for"
    )

    @property
    def extents(self) -> tuple[int, ...]:
        """[frames,] height, width."""
        return (*(() if self.frames is None else (self.frames,)), self.height, self.width)

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels and extents."""
        return (self.channels, *self.extents)

    @property
    def video_frames(self) -> int | None:
        """Frames of the video; None for pictures."""
        return None if self.frames is None else (self.frames - 1) * (self.time_scale or 1) + 1


class VideoChunk(_Frozen):
    """A part of a video that is decoded or encoded at once."""

    graph: int = pydantic.Field(ge=0, description="0: the first graph, else the place among the following, from 1 on")
    start: int = pydantic.Field(ge=0, description="first of the frames that the graph takes: latent ones to decode")


class Components(_Frozen):
    """What turns a prompt or a class label into conditions, and a latent into an image."""

    text_encoder: TextEncoderEntry | None = None
    vae_decoder: Graph | None = pydantic.Field(
        default=None,
        description="latents float32 (batch, C, h, w) -> images float32 (batch, H, W, 3) in [0, 1]; of a "
        "video (batch, C, f, h, w) -> (batch, F, H, W, 3), all of it or the first chunk",
    )
    vae_following: Many[Graph] = pydantic.Field(
        default=(),
        exclude_if=_is_empty,
        description="graphs that decode later chunks of a video: inputs latents and state_N, outputs images and "
        "next_N; what a chunk leaves as next_N is state_N of the one after it, zeros in front of the first",
    )
    vae_chunks: Many[VideoChunk] = pydantic.Field(
        default=(), exclude_if=_is_empty, description="the chunks of a video in order; none: it is decoded at once"
    )
    vae_encoder: Graph | None = pydantic.Field(
        default=None,
        exclude_if=_is_none,
        description="images float32 (batch, H, W, 3) in [0, 1] -> mean and, unless it is deterministic, standard "
        "deviation of their latents, float32 (batch, C, h, w), both times the scaling factor; of a video (batch, F, H, "
        "W, 3) -> (batch, C, f, h, w), all of it or the first chunk",
    )
    vae_encoder_following: Many[Graph] = pydantic.Field(
        default=(),
        exclude_if=_is_empty,
        description="graphs that encode later chunks of a video, with state_N and next_N as in vae_following",
    )
    vae_encoder_chunks: Many[VideoChunk] = pydantic.Field(
        default=(), exclude_if=_is_empty, description="the chunks of a video in order; none: it is encoded at once"
    )
    image_encoder: Graph | None = pydantic.Field(
        default=None,
        exclude_if=_is_none,
        description="images float32 (1, S, S, 3) in [0, 1] -> their embeddings, and those of nothing, (1, 1, [T,] D), "
        "or their states (1, T, D) alone",
    )
    class_labels: dict[str, int] | None = pydantic.Field(default=None, description="label name -> class id")
    null_class: int | None = None
    classes: int | None = pydantic.Field(
        default=None, exclude_if=_is_none, description="how many class ids there are, of a model without a null class"
    )

    @property
    def decoders(self) -> tuple[Graph, ...]:
        """All graphs of the VAE's decoder."""
        return () if self.vae_decoder is None else (self.vae_decoder, *self.vae_following)

    @property
    def encoders(self) -> tuple[Graph, ...]:
        """All graphs of the VAE's encoder."""
        return () if self.vae_encoder is None else (self.vae_encoder, *self.vae_encoder_following)

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """All of them: text encoder, decoder, encoders of pictures."""
        text = () if self.text_encoder is None else (self.text_encoder.graph,)
        return (
            *text,
            *self.decoders,
            *self.encoders,
            *(() if self.image_encoder is None else (self.image_encoder,)),
        )


class Manifest(_Frozen):
    """``manifest.json`` of an engine directory."""

    format_version: Literal[3, 4, 5, 6, 7, 8, 9, 10, 11, 12] = 4
    created_by: str
    model: ModelEntry
    schedule: str = SCHEDULE_NAME
    name: str = pydantic.Field(
        default="", exclude_if=_is_blank, description="of the schedule, in a directory with several"
    )
    others: dict[str, str] = pydantic.Field(
        default_factory=dict,
        exclude_if=_is_empty,
        description="the directory's other schedules: name -> manifest, a file of this kind",
    )
    promoted: Many[tuple[int, str]] = ()
    sampler: SamplerEntry
    dtype: DType
    batch: int = pydantic.Field(description="images per launch")
    guidance: bool
    guidance_scale: float | None = pydantic.Field(default=None, description="default guidance scale")
    guidance_off: float = pydantic.Field(
        default=1.0, exclude_if=_is_one, description="the guidance scale that does nothing; smaller ones are refused"
    )
    latent: LatentSpec
    sizes: SizeRanges | None = pydantic.Field(
        default=None,
        exclude_if=_is_none,
        description="ranges of batch, height and width (latent pixels); batch, latent and all shapes are the largest",
    )
    conditions: Many[ConditionSpec]
    plan: PlanEntry
    quantization: QuantizationEntry | None = pydantic.Field(
        default=None, exclude_if=_is_none, description="none: all weights are in the type of the graphs"
    )
    components: Components
    tools: dict[str, str] = pydantic.Field(description="package versions used for the export")
    files: dict[str, str] = pydantic.Field(description="sha256 of every file, by path relative to the directory")
    seal: str = pydantic.Field(default="", description="sha256 over the content of all the other fields")

    @property
    def quantized(self) -> Method | None:
        """How weights are in fewer bits, None where they are not."""
        return None if self.quantization is None else self.quantization.method

    @property
    def guidance_batch(self) -> Literal[1, 2]:
        """How many of the two halves of guidance a launch has."""
        return 1 if self.plan.halves == HALVES else 2

    @property
    def usual_sizes(self) -> Sizes:
        """The sizes that it has, or of its ranges the usual ones."""
        here = Sizes(self.batch, self.latent.height, self.latent.width)
        return here if self.sizes is None else self.sizes.opt

    def at(self, sizes: Sizes) -> Manifest:
        """The manifest of one choice of sizes, with nothing left open: batch, latent, shapes and values are theirs.

        Cache offsets stay those of the largest sizes, which hold for all.

        Raises:
            UserError: sizes that this engine directory does not take.
        """
        if self.sizes is None:
            here = self.usual_sizes
            if sizes != here:
                raise UserError(f"this engine directory was exported for {here._asdict()}, not {sizes._asdict()}")
            return self
        self.sizes.check(sizes)
        encoder, decoder = self.components.text_encoder, self.components.vae_decoder
        variants = tuple(v.model_copy(update={"graph": v.graph.at(sizes)}) for v in self.plan.variants)
        components = {
            "text_encoder": encoder and encoder.model_copy(update={"graph": encoder.graph.at(sizes)}),
            "vae_decoder": decoder and decoder.at(sizes),
            "vae_encoder": self.components.vae_encoder and self.components.vae_encoder.at(sizes),
        }
        return self.model_copy(
            update={
                "batch": sizes.batch,
                "latent": self.latent.model_copy(update={"height": sizes.height, "width": sizes.width}),
                "sizes": None,
                "conditions": tuple(spec.at(sizes) for spec in self.conditions),
                "plan": self.plan.model_copy(
                    update={"variants": variants, "prologue": self.plan.prologue and self.plan.prologue.at(sizes)}
                ),
                "components": self.components.model_copy(update=components),
            }
        )

    def graph_files(self) -> tuple[str, ...]:
        """Paths of all graphs and of the tokenizers, relative to the directory."""
        encoder = self.components.text_encoder
        names = [graph.file for graph in self.plan.graphs]
        names += [graph.file for graph in self.components.graphs]
        names += [entry.file for entry in encoder.tokenizers] if encoder is not None else []
        return tuple(names)

    def dumps(self) -> str:
        """JSON text with its seal, stable for equal manifests."""
        version = FORECAST_VERSION if any(launch.forecast for launch in self.plan.launches) else FORMAT_VERSION
        version = TABLES_VERSION if self.plan.table_timesteps else version
        version = RUN_ROWS_VERSION if self.plan.table_classes or self.plan.prologue is not None else version
        version = DENOISERS_VERSION if self.model.denoisers else version
        version = SEVERAL_VERSION if self.name else version
        version = QUANTIZED_VERSION if self.quantization is not None else version
        version = GUIDANCE_VERSION if any(launch.guidance != 1 for launch in self.plan.launches) else version
        version = HALVES_VERSION if self.plan.halves == HALVES else version
        document = {**json.loads(self.model_dump_json(exclude={"seal"})), "format_version": version}
        return json.dumps({**document, "seal": seal_of(document)}, indent=1, ensure_ascii=False) + "\n"

    @property
    def folder(self) -> str:
        """Where files are that belong to this schedule alone, relative to the directory."""
        return PurePosixPath(self.schedule).parent.as_posix()

    @classmethod
    def load(cls, engine_dir: Path, *, file: str = MANIFEST_NAME, sealed: bool = True) -> Manifest:
        """Read the manifest of an engine directory. file: which of several. sealed: its seal has to be right.

        Raises:
            UserError: no such directory or manifest, no strict JSON, another format version, a field that is wrong, or
                a manifest that was changed after the export.
        """
        path = engine_dir / file
        if not path.is_file():
            raise UserError(f"{engine_dir}: no {file} there; give an engine directory made by dipgo-export")
        data = documents.read_document(
            path, "manifest of dipgo-export", EXPORT_AGAIN, limit=MAX_MANIFEST_BYTES, most=MAX_MANIFEST_VALUES
        )
        version = data.get("format_version")
        if version == UNSEALED_VERSION:
            _log.warning("%s: was exported before directories were sealed, so changes to it do not show", path)
        elif version not in range(FORMAT_VERSION, HALVES_VERSION + 1):
            raise UserError(
                f"{path}: format_version {str(version)[:20]}, this version reads {UNSEALED_VERSION} to "
                f"{HALVES_VERSION}; export it again or update"
            )
        elif sealed and data.get("seal") != seal_of(data):
            raise UserError(
                f"{path}: was changed after the export (its seal does not fit); export the engine directory again, or, "
                "if the change was meant, seal it with dipgo_deploy.bundle.directory.reseal"
            )
        try:
            return cls.model_validate(data)
        except pydantic.ValidationError as error:
            raise UserError(f"{path}: {one_line(error)}; {EXPORT_AGAIN}") from None


def seal_of(document: Mapping[str, Any]) -> str:
    """The seal of a manifest's plain data: it holds the digest of every file, that of the schedule among them."""
    return documents.digest({key: value for key, value in document.items() if key != "seal"})


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the manifest (shipped as ``manifest.schema.json``)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}
