"""What surrounds the denoiser: text encoders, tokenizers and VAE, exported so that a bundle needs no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from dipgo_deploy.bundle.manifest import Components, Graph, TextEncoderEntry, TokenizerEntry, VideoChunk
from dipgo_deploy.bundle.names import EMBEDS, NEXT, NO_EMBEDS, STATE
from dipgo_deploy.bundle.shapes import SizeRanges, Sizes
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.chunks import Chunks, Part, State, chunks_of, encoder_chunks_of, state_shapes
from dipgo_deploy.export.dynamic import Dimensions, example_sizes
from dipgo_deploy.export.passes import apply
from dipgo_deploy.export.passes.dimensions import NameDimensions
from dipgo_deploy.export.passes.shapes import ShapesFromSizes
from dipgo_deploy.export.program import to_onnx, torch_dtype
from dipgo_deploy.export.tensors import graph_entry
from dipgo_deploy.export.weights import save_graph, write_weights
from dipgo_deploy.reference.conditions import as_tokenized
from dipgo_deploy.reference.vae import (
    decoded,
    deviation_of,
    from_images,
    from_vae,
    scaling_and_shift,
    to_images,
    to_vae,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from dipgo_deploy.bundle.manifest import ConditionSpec, LatentSpec
    from dipgo_deploy.models.family import TextScheme


def export_components(
    pipeline: Any,
    scheme: TextScheme | None,
    conditions: Sequence[ConditionSpec],
    stage: Path,
    latent: LatentSpec,
    *,
    batch: int,
    sizes: SizeRanges | None = None,
    dtype: str,
    pixels: bool = False,
    encoder: bool = False,
    embeds: ConditionSpec | None = None,
    float32: Sequence[str] = (),
) -> Components:
    """Export what the diffusers pipeline has beside its denoiser into the folder ``stage``.

    The modules are converted to ``dtype`` in place, but for what the model itself keeps in float32 and the components
    ``float32``.

    Args:
        scheme: how its prompts are encoded.
        conditions: the denoiser's, of which those of source ``text`` become outputs.
        pixels: the latent is the picture.
        embeds: the condition that is a picture's embeddings or states, of which the image encoder is exported.
        encoder: export the VAE's encoder too, for image-to-image and conditions that are a picture's latents.

    Raises:
        UserError: a component that the exporter refuses, or a tokenizer that has no ``tokenizers`` form.
    """
    vae = getattr(pipeline, "vae", None)
    vae_dtype = "fp32" if "vae" in float32 or vae is None else _vae_dtype(pipeline, dtype)
    seen_dtype = "fp32" if "image_encoder" in float32 else dtype
    decoder: Graph | None = None
    following: list[Graph] = []
    chunks = None if vae is None else chunks_of(vae, latent.frames)
    if chunks is not None:
        decoder, *following = _decoder_in_chunks(vae, chunks, stage, latent, batch, vae_dtype)
    elif vae is not None:
        decoder = _vae_decoder(vae, stage, latent, batch, sizes, vae_dtype)
    elif pixels and latent.channels in (1, 3):
        decoder = _export(
            _PixelDecoder(),
            _latents(batch, latent, sizes),
            ["latents"],
            ["images"],
            stage,
            "vae_decoder",
            "fp32",
            sizes=sizes,
        )
    encoders: list[Graph] = []
    encoder_chunks = None
    if encoder and decoder is not None:
        frames = _encoded_frames(conditions, latent)
        encoder_chunks = None if frames is None else encoder_chunks_of(vae, frames)
        encoders = _vae_encoder(vae, stage, decoder, frames, encoder_chunks, sizes, vae_dtype)
    labels = getattr(pipeline, "labels", None)  # DiTPipeline: name -> class id
    classes = getattr(getattr(pipeline, "transformer", None), "config", {}).get("num_embeds_ada_norm")
    return Components(
        text_encoder=_text_encoder(pipeline, scheme, conditions, stage, dtype, float32)
        if scheme is not None and scheme.has_encoders(pipeline)
        else None,
        vae_decoder=decoder,
        vae_following=tuple(following),
        vae_chunks=_order(chunks),
        image_encoder=None if embeds is None else _image_encoder(pipeline.image_encoder, embeds, stage, seen_dtype),
        vae_encoder=encoders[0] if encoders else None,
        vae_encoder_following=tuple(encoders[1:]),
        vae_encoder_chunks=_order(encoder_chunks),
        class_labels=dict(labels) if labels else None,
        null_class=classes,
        classes=getattr(getattr(pipeline, "unet", None), "config", {}).get("num_class_embeds"),
    )


def _text_encoder(
    pipeline: Any,
    scheme: TextScheme,
    conditions: Sequence[ConditionSpec],
    stage: Path,
    dtype: str,
    float32: Sequence[str],
) -> TextEncoderEntry:
    encoders = {name: getattr(pipeline, name) for name in scheme.encoders}
    for name, encoder in encoders.items():
        _convert(encoder, "fp32" if name in float32 else dtype)
    names = [name for spec in scheme.tokenizers for name in (spec.ids, spec.mask) if name is not None]
    outputs = [spec.name for spec in conditions if spec.source == "text"]
    twice = sorted({*names} & {*outputs})
    if twice:
        raise UserError(f"{twice[0]}: is a condition and a name of what its tokenizer gives; give that another name")

    class Encoders(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, encoder in encoders.items():
                self.add_module(name, encoder)

        def forward(self, *tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
            encoded = scheme.encode(pipeline, dict(zip(names, tokens, strict=True)))
            # An output that is an input (a mask) or a view of one has no node of its own.
            return tuple(encoded[name] + 0 for name in outputs)

    tokens = [
        torch.ones(1, spec.length, dtype=torch.int64)
        for spec in scheme.tokenizers
        for _ in range(2 if spec.mask else 1)
    ]
    # One encoder keeps the names of its weights as they are in its own files, which is how LoRA files name them.
    prefix = f"{scheme.encoders[0]}." if len(encoders) == 1 else ""
    graph = _export(Encoders(), tokens, names, outputs, stage, "text_encoder", dtype, prefix)
    entries = []
    for spec in scheme.tokenizers:
        tokenizer = spec.of(pipeline)
        file = f"{spec.attribute}/tokenizer.json"
        _save_tokenizer(tokenizer, stage / file)
        entries.append(
            TokenizerEntry(
                file=file,
                length=spec.length,
                pad_id=int(tokenizer.pad_token_id),
                ids=spec.ids,
                mask=spec.mask,
                padding=spec.padding,
                special=spec.special,
                plain=spec.plain,
                expansions=_expansions(pipeline, tokenizer),
            )
        )
    return TextEncoderEntry(
        graph=graph,
        tokenizers=tuple(entries),
        zeros_without_negative=scheme.zeros_without_negative,
        lowercase=scheme.lowercase,
        prefix=scheme.prefix,
        around=scheme.around,
        removed=scheme.removed,
        unescape=scheme.unescape,
    )


def _expansions(pipeline: Any, tokenizer: Any) -> dict[str, str]:
    """Tokens of textual inversions with several vectors, and what stands in the place of each in a prompt."""
    added = sorted(tokenizer.added_tokens_encoder)
    expanded = {token: as_tokenized(pipeline, tokenizer, token) for token in added}
    return {token: text for token, text in expanded.items() if text != token}


def _convert(module: torch.nn.Module, dtype: str) -> None:
    """``module`` in the export's dtype, without what transformers keeps in float32 for its range (T5's ``wo``)."""
    kept = tuple(getattr(module, "_keep_in_fp32_modules", None) or ()) if dtype == "fp16" else ()
    parts = [part for name, part in module.named_modules() if name.rpartition(".")[2] in kept]
    # Their own values: what was rounded to half precision stays so in float32.
    own = [(parameter, parameter.data) for part in parts for parameter in part.parameters()]
    module.to(torch_dtype(dtype)).eval()
    for parameter, data in own:
        parameter.data = data.float()


def _vae_dtype(pipeline: Any, dtype: str) -> str:
    """float32 for a VAE that overflows in float16: diffusers' pipelines for such have ``upcast_vae``."""
    upcast = dtype == "fp16" and hasattr(pipeline, "upcast_vae") and pipeline.vae.config.get("force_upcast")
    return "fp32" if upcast else dtype


def _to(vae: Any, dtype: torch.dtype) -> None:
    """Past diffusers' own ``to``, which warns of modules to keep in float32 where there are none."""
    torch.nn.Module.to(vae.eval(), dtype)


class _PixelDecoder(torch.nn.Module):
    """[-1, 1] (B, C, H, W) -> pictures as a VAE decoder's graph gives them; a grey one in three equal channels."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        image = (latents / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return image.expand(-1, -1, -1, 3)


def _latents(batch: int, latent: LatentSpec, sizes: SizeRanges | None) -> list[torch.Tensor]:
    example = Sizes(batch, latent.height, latent.width) if sizes is None else example_sizes(sizes)
    at_example = latent.model_copy(update={"height": example.height, "width": example.width})
    return [torch.randn(example.batch, *at_example.shape)]


def _vae_decoder(vae: Any, stage: Path, latent: LatentSpec, batch: int, sizes: SizeRanges | None, dtype: str) -> Graph:
    scaling_and_shift(vae)  # refused before the trace

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            return to_images(decoded(self.vae, latents))

    _to(vae, torch_dtype(dtype))
    latents = _latents(batch, latent, sizes)
    return _export(Decoder(), latents, ["latents"], ["images"], stage, "vae_decoder", dtype, "vae.", sizes=sizes)


def _decoder_in_chunks(
    vae: Any, chunks: Chunks, stage: Path, latent: LatentSpec, batch: int, dtype: str
) -> list[Graph]:
    """The graph of each distinct part, beside one file of weights."""
    _to(vae, torch_dtype(dtype))
    shapes = state_shapes(vae, chunks, (batch, *latent.shape))

    def taken(part: Part) -> torch.Tensor:
        return torch.randn(batch, latent.channels, part.stop - part.start, *latent.extents[1:])

    return _in_chunks(_DecoderPart, "latents", taken, vae, chunks, shapes, stage, "vae_decoder", dtype)


def _order(chunks: Chunks | None) -> tuple[VideoChunk, ...]:
    return () if chunks is None else tuple(VideoChunk(graph=part, start=start) for part, start in chunks.order)


def _in_chunks(
    kind: type[_VaePart],
    given: str,
    taken: Callable[[Part], torch.Tensor],
    vae: Any,
    chunks: Chunks,
    states: Sequence[torch.Size],
    stage: Path,
    name: str,
    dtype: str,
) -> list[Graph]:
    """The graph of each distinct part. given: name of what it takes; taken: an example; states: their shapes."""
    models = []
    for number, part in enumerate(chunks.parts):
        before = [torch.zeros(shape, dtype=vae.dtype) for shape in states] if number else []
        outputs: list[str] = []
        model = to_onnx(
            kind(vae, part, outputs, last=len(chunks.order) == 1).eval(),
            [taken(part), *before],
            [given, *(f"{STATE}{place}" for place in range(len(before)))],
            lambda outputs=outputs: outputs,  # type: ignore[misc]
            dtype=dtype,
            prefix="vae.",
            label=name.replace("_", " "),
        )
        _name_constants(model, number, vae)
        models.append(model)
    names = ["model", *(f"{name}_{number}" for number in range(1, len(models)))]
    return _save_all(dict(zip(names, models, strict=True)), stage, name)


def _name_constants(model: ir.Model, number: int, vae: Any) -> None:
    """Constants of graph ``number`` under names of its own: only parameters are the same in all."""
    parameters = vae.state_dict().keys()
    for value in list(model.graph.initializers.values()):
        if value.name not in parameters:
            value.name = f"{value.name}/{number}"


class _VaePart(torch.nn.Module):
    """A chunk and the state in front of it -> what is made of it and the state behind; ``outputs`` are its names."""

    def __init__(self, vae: Any, part: Part, outputs: list[str], *, last: bool) -> None:
        super().__init__()
        self.vae = vae
        self._part, self._outputs, self._last = part, outputs, last

    def _named(self, made: Mapping[str, torch.Tensor], left: State) -> tuple[torch.Tensor, ...]:
        kept = {} if self._last else {f"{NEXT}{place}": entry for place, entry in enumerate(left) if entry is not None}
        self._outputs[:] = [*made, *kept]
        return *made.values(), *kept.values()


class _DecoderPart(_VaePart):
    """Latents -> images."""

    def forward(self, latents: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        video, left = self._part.run(self.vae, to_vae(self.vae, latents).to(self.vae.dtype), state)
        return self._named({"images": to_images(video)}, left)


class _EncoderPart(_VaePart):
    """Images -> mean and standard deviation of their latents."""

    def forward(self, images: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        moments, left = self._part.run(self.vae, from_images(self.vae, images).to(self.vae.dtype), state)
        return self._named(_scaled(self.vae, DiagonalGaussianDistribution(moments)), left)


def _scaled(vae: Any, spread: Any) -> dict[str, torch.Tensor]:
    """Mean and standard deviation of a distribution, as latents float32 that a denoiser sees."""
    return {"mean": from_vae(vae, spread.mean.float()), "std": deviation_of(vae, spread.std.float())}


def _encoded_frames(conditions: Sequence[ConditionSpec], latent: LatentSpec) -> int | None:
    """Frames of the video that conditions are the latents of; None for a model of pictures."""
    if latent.frames is None:
        return None
    most = max(spec.shape[2] for spec in conditions if spec.picture.form == "latents")
    return (most - 1) * (latent.time_scale or 1) + 1


def _vae_encoder(
    vae: Any,
    stage: Path,
    decoder: Graph,
    frames: int | None,
    chunks: Chunks | None,
    sizes: SizeRanges | None,
    dtype: str,
) -> list[Graph]:
    """For pictures of the decoder's sizes, or videos of so many frames. A VAE without a distribution (a tiny one) has
    no standard deviation."""
    scaling_and_shift(vae)  # refused before the trace
    torch_type = torch_dtype(dtype)
    outputs: list[str] = []
    shape = decoder.outputs[0].shape
    pixels = None
    if sizes is not None:
        pixels = shape[1] // decoder.inputs[0].shape[2]
        example = example_sizes(sizes)
        shape = (example.batch, example.height * pixels, example.width * pixels, shape[3])
    if frames is not None:
        shape = (shape[0], frames, *shape[2:])

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            encoded = vae.encode(from_images(vae, images).to(torch_type))
            spread = getattr(encoded, "latent_dist", None)
            found = {"mean": from_vae(vae, encoded.latents.float())} if spread is None else _scaled(vae, spread)
            outputs[:] = found
            return tuple(found.values())

    _to(vae, torch_type)
    if chunks is None:
        images = [torch.rand(shape)]
        names = ["images"]
        return [
            _export(Encoder(), images, names, outputs, stage, "vae_encoder", dtype, "vae.", sizes=sizes, pixels=pixels)
        ]

    def taken(part: Part) -> torch.Tensor:
        return torch.rand(shape[0], part.stop - part.start, *shape[2:])

    states = state_shapes(vae, chunks, (shape[0], 3, *shape[1:4]))
    return _in_chunks(_EncoderPart, "images", taken, vae, chunks, states, stage, "vae_encoder", dtype)


def _image_encoder(encoder: Any, embeds: ConditionSpec, stage: Path, dtype: str) -> Graph:
    """Embeddings of one picture and, as diffusers' pipelines have them for the unconditional half, of none: zeros for a
    pooled embedding, the states of a picture of mean colour for all of them. Or the states of one picture alone."""
    torch_type = torch_dtype(dtype)
    mean, deviation = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    alone, states = embeds.picture.form == "states", len(embeds.shape) == 4

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image_encoder = encoder

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            pixels = ((images.permute(0, 3, 1, 2) - mean) / deviation).to(torch_type)
            if alone:
                return (encoder(pixels, output_hidden_states=True).hidden_states[-2].float(),)
            if states:
                both = encoder(torch.cat([pixels, torch.zeros_like(pixels)]), output_hidden_states=True)
                found = both.hidden_states[-2].float()[:, None]
                return found[:1], found[1:]
            found = encoder(pixels).image_embeds.float()[:, None]
            return found, found * 0

    encoder.to(torch_type).eval()
    side = int(encoder.config.image_size)
    images = torch.rand(1, side, side, 3)
    outputs = [EMBEDS] if alone else [EMBEDS, NO_EMBEDS]
    return _export(Encoder(), [images], ["images"], outputs, stage, "image_encoder", dtype, "image_encoder.")


def _export(
    module: torch.nn.Module,
    arguments: Sequence[torch.Tensor],
    inputs: Sequence[str],
    outputs: Sequence[str],
    stage: Path,
    name: str,
    dtype: str,
    prefix: str = "",
    *,
    sizes: SizeRanges | None = None,
    pixels: int | None = None,
) -> Graph:
    """``sizes``: ranges of the first argument, a latent, or images of so many ``pixels`` to one of it."""
    model = to_onnx(
        module.eval(),
        arguments,
        inputs,
        lambda: outputs,
        dtype=dtype,
        prefix=prefix,
        label=name.replace("_", " "),
        dynamic_shapes=None if sizes is None else [_open(sizes, pixels)],
    )
    if sizes is not None:
        apply(model, NameDimensions(inputs[0], sizes, pixels), ShapesFromSizes(inputs[0], pixels))
    return _save_all({"model": model}, stage, name, sizes)[0]


def _open(sizes: SizeRanges, pixels: int | None) -> dict[int, Any]:
    """The open axes of a latent, or of images of so many pixels to one of it."""
    dimensions = Dimensions(sizes)
    return dimensions.latent if pixels is None else dimensions.images(pixels)


def _save_all(models: Mapping[str, ir.Model], stage: Path, name: str, sizes: SizeRanges | None = None) -> list[Graph]:
    """Graphs of one component, by file name, beside one file of weights."""
    folder = stage / "components" / name
    folder.mkdir(parents=True)
    write_weights(list(models.values()), folder)
    entries = []
    for file, model in models.items():
        path = folder / f"{file}.onnx"
        save_graph(model, path)
        entries.append(graph_entry(model, path.relative_to(stage).as_posix(), sizes))
    return entries


def _save_tokenizer(tokenizer: Any, path: Path) -> None:
    """Write the ``tokenizers`` form, without padding and truncation, which the runtime sets itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{type(tokenizer).__name__}: has no `tokenizers` form; save the pipeline with a fast tokenizer"
        )
    data = json.loads(backend.to_str())
    data.update(padding=None, truncation=None)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
