"""The manifest: everything a runtime needs to know about an engine directory, without loading a graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pydantic

from dipgo_deploy.errors import UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SCHEDULE_NAME = "schedule.json"
MAX_MANIFEST_BYTES = 64 * 2**20

DType = Literal["fp32", "fp16", "bf16"]
TensorDType = Literal["float32", "float16", "bfloat16", "int64"]
NUMPY_DTYPES: dict[str, str] = {"float32": "float32", "float16": "float16", "int64": "int64"}
ITEM_SIZES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}


class _Frozen(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_Frozen):
    """Name, shape and dtype of a graph input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: TensorDType

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * ITEM_SIZES[self.dtype]


class Graph(_Frozen):
    """One ONNX file of the directory (path relative to it) with its inputs and outputs in graph order."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class VariantEntry(_Frozen):
    """One denoiser variant: its graph, which inputs and outputs are caches (in arena binding order), and its MACs."""

    name: str
    graph: Graph
    reads: tuple[str, ...] = pydantic.Field(description="graph input names bound to the cache arena, in order")
    writes: tuple[str, ...] = pydantic.Field(description="graph output names bound to the cache arena, in order")
    predicts: bool
    macs: int


class LaunchEntry(_Frozen):
    """One launch, in the order of the run."""

    step: int = pydantic.Field(description="evaluation index, 0-based")
    variant: int
    timestep: float
    coefficients: tuple[float, ...] = pydantic.Field(
        description="weights of the stack's slots: the model's latent input"
    )
    reads: tuple[int, ...] = pydantic.Field(description="arena byte offsets, in the order of the variant's reads")
    writes: tuple[int, ...] = pydantic.Field(description="arena byte offsets, in the order of the variant's writes")
    slot: int | None = pydantic.Field(description="slot of the stack that the prediction is written to")


class PlanEntry(_Frozen):
    """The loop: variants, launches, the stack and the cache arena.

    The stack is float32 (slots, batch, channels, height, width): slot 0 is the initial noise, then the predictions,
    then ``noises`` noise draws in the order in which the sampler draws them.
    """

    variants: tuple[VariantEntry, ...]
    launches: tuple[LaunchEntry, ...]
    final: tuple[float, ...] = pydantic.Field(description="weights of the stack's slots: the final latent")
    slots: int
    noises: int
    arena_bytes: int
    lower_bound_bytes: int
    macs_full: int
    macs_schedule: int
    macs_run: int
    evaluations: int


class ModelEntry(_Frozen):
    """Identity of the exported denoiser."""

    class_name: str
    name: str
    config_hash: str
    granularity: Literal["block", "layer"]
    config: dict[str, Any]


class SamplerEntry(_Frozen):
    """The diffusers scheduler that the coefficients were taken from."""

    class_name: str
    config: dict[str, Any]
    num_inference_steps: int


class TextEncoderEntry(_Frozen):
    """A text encoder component: token ids int64 (1, length) -> embeddings (1, length, width)."""

    graph: Graph
    tokenizer: str = pydantic.Field(description="tokenizer file, relative to the engine directory")
    length: int
    pad_id: int
    output: str = pydantic.Field(description="condition input of the denoiser that it feeds")


class LatentSpec(_Frozen):
    """Shape of the latent (without the batch)."""

    channels: int
    height: int
    width: int


class Components(_Frozen):
    """What turns a prompt or a class label into conditions, and a latent into an image."""

    text_encoder: TextEncoderEntry | None = None
    vae_decoder: Graph | None = pydantic.Field(
        default=None, description="latents float32 (batch, C, h, w) -> images float32 (batch, H, W, 3) in [0, 1]"
    )
    class_labels: dict[str, int] | None = pydantic.Field(default=None, description="label name -> class id")
    null_class: int | None = None


class Manifest(_Frozen):
    """``manifest.json`` of an engine directory."""

    format_version: Literal[1] = 1
    created_by: str
    model: ModelEntry
    schedule: str = SCHEDULE_NAME
    promoted: tuple[tuple[int, str], ...] = ()
    sampler: SamplerEntry
    dtype: DType
    batch: int = pydantic.Field(description="images per launch")
    guidance: bool
    guidance_scale: float | None = pydantic.Field(default=None, description="default guidance scale")
    latent: LatentSpec
    conditions: tuple[TensorSpec, ...]
    plan: PlanEntry
    components: Components
    tools: dict[str, str] = pydantic.Field(description="package versions used for the export")
    files: dict[str, str] = pydantic.Field(description="sha256 of every file, by path relative to the directory")

    def graph_files(self) -> tuple[str, ...]:
        """Paths of all graphs and of the tokenizer, relative to the directory."""
        encoder, decoder = self.components.text_encoder, self.components.vae_decoder
        names = [variant.graph.file for variant in self.plan.variants]
        names += [encoder.graph.file, encoder.tokenizer] if encoder is not None else []
        names += [decoder.file] if decoder is not None else []
        return tuple(names)

    def dumps(self) -> str:
        """JSON text, stable for equal manifests."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def load(cls, engine_dir: Path) -> Manifest:
        """Read the manifest of an engine directory.

        Raises:
            UserError: no such directory or manifest, not JSON, another format version, or a field that is wrong.
        """
        path = engine_dir / MANIFEST_NAME
        if not path.is_file():
            raise UserError(f"{engine_dir}: no {MANIFEST_NAME} there; give an engine directory made by dipgo-export")
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise UserError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes; not a manifest of dipgo-export")
        try:
            data = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}); export the engine directory again") from None
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version {version!r}, this version reads {FORMAT_VERSION}; export it again or update"
            )
        try:
            return cls.model_validate(data)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{path}: {where}: {first['msg']}; export the engine directory again") from None


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the manifest (shipped as ``manifest.schema.json``)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}
