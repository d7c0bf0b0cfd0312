"""Prompt or class label -> picture, from an engine directory."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from dipgo_deploy import arguments
from dipgo_deploy.backends import create_backend
from dipgo_deploy.backends.base import Backend
from dipgo_deploy.backends.storage import fits
from dipgo_deploy.backends.tensorrt_queue import GraphMode
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import ConditionSpec
from dipgo_deploy.bundle.names import EMBEDS, NO_EMBEDS
from dipgo_deploy.bundle.self_test import read_self_test
from dipgo_deploy.errors import NotFiniteError, UserError
from dipgo_deploy.lora.file import LoraChoice
from dipgo_deploy.runtime.given_pictures import picture_conditions
from dipgo_deploy.runtime.image import Picture, batch_for, pad_batch, to_pil
from dipgo_deploy.runtime.loaded import Loaded
from dipgo_deploy.runtime.loop import DenoisingLoop
from dipgo_deploy.runtime.memory import process_memory
from dipgo_deploy.runtime.noise import Noise, TorchNoise, noise_of
from dipgo_deploy.runtime.requests import (
    Asked,
    Embeds,
    OutputType,
    Request,
    TextRequest,
    check_request,
    class_condition,
    text_conditions,
)
from dipgo_deploy.runtime.self_test import SelfTestReport, run_self_test
from dipgo_deploy.schedule.solver import FittedTo

if TYPE_CHECKING:
    from PIL.Image import Image

    from dipgo_deploy.lora.merge import LoraReport

_log = logging.getLogger(__name__)

Conditions = dict[str, tuple[np.ndarray | None, np.ndarray]]
LoadMode = Literal["eager", "call", "lazy", "auto"]
LOAD_MODES: tuple[LoadMode, ...] = ("eager", "call", "lazy", "auto")


@dataclass(frozen=True)
class Timings:
    """Seconds of one call. ``load`` is 0 once everything is loaded; with lazy loading it is part of the others.
    ``text``: of encoding prompts and the picture to start from."""

    load: float
    text: float
    loop: float
    decode: float
    total: float


@dataclass(frozen=True)
class PipelineOutput:
    """What a call gives.

    Attributes:
        images: pictures, or the frames of all videos, one video behind the other (``pil``); float32 (n, [F,] H, W, 3)
            in [0, 1] (``np``); a tensor float32 (n, [F,] 3, H, W) of the same (``pt``); or the latents again
            (``latent``).
        latents: float32 (n, C, [f,] h, w).
        frames: of each video, None for pictures.
        launches: graph launches of the whole call.
    """

    images: Any
    latents: np.ndarray
    timings: Timings
    launches: int
    frames: int | None = None

    @property
    def videos(self) -> list[list[Image]]:
        """The frames of each video, of output type ``pil``."""
        count = self.frames or 1
        return [list(self.images[start : start + count]) for start in range(0, len(self.images), count)]


@dataclass(frozen=True)
class _Watch:
    """Who is told how far a call is. tensors: what ``step_ended`` gets."""

    launched: Callable[[int, int], Any] | None
    step_ended: Callable[[Pipeline, int, float, dict[str, Any]], Any] | None
    tensors: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = [name for name in self.tensors if name != "latents"]
        if unknown:
            raise UserError(f"callback_on_step_end_tensor_inputs: {unknown[0]!r}, there is 'latents' alone")

    @property
    def any(self) -> bool:
        """Whether anyone is."""
        return self.launched is not None or self.step_ended is not None


@dataclass(frozen=True)
class _Drawn:
    """What a loop starts from.

    Attributes:
        picture: latents of the picture to start from, (images, C, h, w).
        latents: unit noise, (images, C, h, w).
    """

    conditions: Conditions
    picture: np.ndarray | None
    latents: np.ndarray


class Pipeline:
    """An engine directory ready to draw.

    Threads may share it: there is one set of buffers, so calls (and ``load``, ``load_lora``, ``unload_lora``) wait for
    each other and run one at a time. Pipelines of their own run at the same time.

    Nothing is loaded before the first picture: call ``load`` to pay for it ahead of that. With ``lazy`` each graph is
    loaded when it is first launched.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, lazy: bool = False, loaded: Loaded | None = None) -> None:
        self.bundle = bundle
        self.backend = backend
        self._loaded = Loaded(backend, lazy=lazy) if loaded is None else loaded
        self._fitted_to: FittedTo | None = _fitted_to(bundle)
        self._said: set[str] = set()

    @classmethod
    def from_engine_dir(
        cls,
        engine_dir: str | os.PathLike[str],
        backend: str = "auto",
        *,
        threads: int | None = None,
        share_weights: bool | None = None,
        cuda_graph: GraphMode = "off",
        verify: bool = False,
        load: LoadMode = "eager",
        lora: Sequence[tuple[str | os.PathLike[str], float] | tuple[str | os.PathLike[str], float, str]] = (),
        lora_partial: bool = False,
        schedule: str | None = None,
        launches: int | None = None,
    ) -> Self:
        """Open an engine directory made by ``dipgo-export``.

        Args:
            engine_dir: the directory.
            backend: ``auto``, ``cpu``, ``cuda``, ``openvino``, ``tensorrt`` or ``tensorrt-rtx``.
            threads: CPU threads of one launch; None: the backend's default.
            share_weights: one copy of the weights for all graphs, at the price of slower products on the CPU; None:
                on CUDA only.
            cuda_graph: TensorRT's launches as captured graphs: ``off``, one for each ``step``, or one ``loop``.
            verify: check the sha256 of every file first.
            load: ``eager``: all graphs now; ``call``: all at the first call, after its arguments were checked;
                ``lazy``: each graph when it is first launched, so that the first launch comes early and what is never
                used takes no memory (on the CPU without what makes loading slow, see ``quick_start`` of
                ``OnnxRuntimeBackend``); ``auto``: ``lazy`` on the CPU, ``call`` elsewhere.
            lora: LoRA files to start with, as (file, scale) or (file, scale, denoiser); see ``load_lora``.
            lora_partial: ``partial`` for each of them.
            schedule: of a directory with several schedules the name of one; None: its first.
            launches: or the one that has launches at so many evaluations.

        Raises:
            UserError: the directory is wrong or damaged, or the backend cannot run it here.
        """
        arguments.choice("load", load, LOAD_MODES)
        choices = _lora_choices(lora, arguments.flag("lora_partial", lora_partial))
        bundle = Bundle.open(engine_dir, schedule=schedule, launches=launches, verify=verify)
        created = create_backend(
            backend,
            threads=threads,
            share_weights=share_weights,
            cuda_graph=cuda_graph,
            quick_start=load in ("lazy", "auto"),
        )
        created.check(bundle.manifest)
        lazy = load == "lazy" or (load == "auto" and created.name in ("cpu", "openvino"))
        pipeline = cls(bundle, created, lazy=lazy)
        if choices:
            pipeline._loaded.change_weights(bundle, choices)
        if load == "eager":
            pipeline.load()
        return pipeline

    def with_schedule(self, name: str) -> Self:
        """A pipeline for another schedule of the same engine directory.

        Graphs, text encoder, VAE and LoRAs are those of this one; buffers and launches are its own. Calls of both wait
        for each other.

        Raises:
            UserError: the directory has no schedule of that name.
        """
        bundle = Bundle.open(self.bundle.path, schedule=name)
        self.bundle.check_unchanged()
        self.backend.check(bundle.manifest)
        return type(self)(bundle, self.backend, loaded=self._loaded)

    def load(self) -> None:
        """Load and bind the denoiser's graphs, the text encoder and the VAE, where not done yet.

        Raises:
            UserError: a graph cannot be loaded.
        """
        with self._loaded.alone("load"):
            self._loaded.all_of(self.bundle)

    def load_lora(
        self, file: str | os.PathLike[str], scale: float = 1.0, *, partial: bool = False, denoiser: str = ""
    ) -> LoraReport:
        """Add a LoRA to the weights of the denoiser, all variants alike, and of the text encoders.

        Several add up, each with its scale. Graphs that were loaded are loaded again with the merged weights; those of
        a variant that lacks a layer just do not change.

        Args:
            file: safetensors, in the spelling of diffusers, PEFT, kohya, XLabs or ComfyUI, or a folder of it.
            scale: of the update; 0 changes nothing.
            partial: leave out what cannot be applied; the result says what.
            denoiser: which one it is for, of a model of several (``transformer_2``); the first by default.

        Raises:
            UserError: the file cannot be read, does not fit this model, or (without ``partial``) not as a whole, or
                the backend cannot change weights here; the pipeline is then as it was.
        """
        (choice,) = _lora_choices([(file, scale, denoiser)], arguments.flag("partial", partial))
        with self._loaded.alone("load_lora"):
            return self._loaded.change_weights(self.bundle, [*self._loaded.loras, choice])[-1]

    def unload_lora(self) -> None:
        """Undo every ``load_lora``: the weights are again, bit for bit, those of the engine directory."""
        with self._loaded.alone("unload_lora"):
            self._loaded.change_weights(self.bundle, [])

    def load_lora_weights(
        self,
        file: str | os.PathLike[str],
        *,
        weight_name: str | None = None,
        scale: float = 1.0,
        partial: bool = False,
        denoiser: str = "",
    ) -> LoraReport:
        """``load_lora`` in diffusers' words; weight_name: the file within a folder."""
        folder = arguments.path("lora file", file)
        path = folder if weight_name is None else folder / arguments.text("weight_name", weight_name)
        return self.load_lora(path, scale, partial=partial, denoiser=denoiser)

    def unload_lora_weights(self) -> None:
        """``unload_lora`` in diffusers' words."""
        self.unload_lora()

    @property
    def loras(self) -> tuple[LoraReport, ...]:
        """What became of each LoRA that is loaded, in order."""
        return self._loaded.reports

    def memory(self) -> dict[str, Any]:
        """Bytes. ``host``: of this process (``rss``, ``pss``); ``device``: as the backend knows them, empty on the CPU;
        ``graphs_loaded`` of ``graphs`` variants, the components not counted."""
        variants = {launch.variant for launch in self.bundle.manifest.plan.launches}
        return {
            "host": process_memory(),
            "device": self.backend.memory(),
            "graphs_loaded": self._loaded.graphs_loaded(self.bundle),
            "graphs": len(variants),
        }

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        generator: Any = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        latents: np.ndarray | None = None,
        prompt_embeds: Embeds | None = None,
        negative_prompt_embeds: Embeds | None = None,
        conditions: Mapping[str, np.ndarray] | None = None,
        image: Picture | Sequence[Picture] | None = None,
        image_latents: np.ndarray | None = None,
        strength: float | None = None,
        control_image: Picture | Sequence[Picture] | None = None,
        control_scale: float | Sequence[float] | None = None,
        mask_image: Picture | Sequence[Picture] | None = None,
        ip_adapter_image: Picture | Sequence[Picture] | None = None,
        ip_adapter_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        output_type: OutputType = "pil",
        callback: Callable[[int, int], Any] | None = None,
        callback_on_step_end: Callable[[Pipeline, int, float, dict[str, Any]], Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> PipelineOutput:
        """Draw pictures.

        Args:
            prompt: one or several prompts, for a text model.
            negative_prompt: one, or one for each prompt; default "".
            class_labels: class ids or names, for a class model.
            num_images_per_prompt: pictures for each prompt or class label; those of one prompt follow each other.
            seed: the latents of the picture to start from are drawn from it where there is one, then all initial
                latents in one draw, those of other pictures before or after that as the model's pipeline does, then the
                sampler's noise, as diffusers does with ``torch.Generator("cpu").manual_seed(seed)`` for a pipeline in
                float32; or a seed for each image, as diffusers takes a list of generators: each image is then the one
                that its seed gives alone.
            generator: in place of the seed a torch.Generator of the CPU, or one for each image, as diffusers takes it;
                it goes on from where it is.
            num_inference_steps: those of the engine directory's sampler, or nothing.
            guidance_scale: at least 1; default: the engine directory's.
            guidance_scale_2: of the second denoiser, of a model of two; default: the same.
            latents: initial unit noise (n, C, h, w), instead of the seed's.
            prompt_embeds: text embeddings (prompts, L, D), instead of prompts; for a model with several text
                conditions (a pooled embedding, a mask) a dictionary of all of them, by the manifest's names.
            negative_prompt_embeds: the same for the negative prompt; one or one for each prompt.
            conditions: other values, (1 or images, ...), for conditions that depend on neither prompt nor class, such
                as SDXL's ``time_ids``, and for those that are made of pictures, by the manifest's names.
            image: what to start from, for an engine directory that was exported with a strength, and what a model is
                shown that draws into a picture or after one: a PIL picture, which is resized, or an array (H, W, 3) of
                its size, float in [0, 1] or uint8; one, or one for each prompt.
            image_latents: its latents (1 or prompts, C, h, w), scaled as the VAE's encoder does, instead of it.
            strength: that of the engine directory, or nothing.
            mask_image: where a model draws into ``image`` (white), as that, or (H, W).
            ip_adapter_image: what an IP-Adapter draws after: as ``image``, of any size.
            ip_adapter_scale: of what it adds; default 1.
            control_image: what a ControlNet looks at, or a model with control of its own, as ``image``; with several
                ControlNets a list with one such entry for each, in the order of their folders.
            control_scale: of what the ControlNet adds, or one for each; default 1.
            height, width: of the pictures in pixels, where the engine directory leaves them open; the usual ones of its
                ranges by default.
            num_frames: that of the engine directory, or nothing.
            output_type: ``pil``, ``np``, ``latent``, or, in a program that has imported torch, ``pt``.
            callback: called with (launches done, launches in all) after each launch.
            callback_on_step_end: called as diffusers does, with (pipeline, evaluation, timestep, tensors), after each
                evaluation that is launched; of several batches for each. What it returns is not put back.
            callback_on_step_end_tensor_inputs: which tensors it gets, of ``latents``: what the next evaluation gets, or
                the final ones, float32 (batch, C, [f,] h, w). None of them saves copies from the device.
            return_dict: False gives, as diffusers does, a tuple of the images alone.

        Raises:
            UserError: an argument does not fit the engine directory (checked before anything runs), or a run failed.
            NotFiniteError: prompt, prediction or picture came out as NaN or infinity (too large a LoRA or guidance
                scale, an overflow of float16, damaged weights); the message names the first launch or component.
        """
        start = time.perf_counter()
        asked = Asked(
            prompt=prompt,
            negative_prompt=negative_prompt,
            class_labels=class_labels,
            num_images_per_prompt=num_images_per_prompt,
            guidance_scale=guidance_scale,
            guidance_scale_2=guidance_scale_2,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            conditions=conditions,
            image=image,
            image_latents=image_latents,
            strength=strength,
            control_image=control_image,
            control_scale=control_scale,
            mask_image=mask_image,
            ip_adapter_image=ip_adapter_image,
            ip_adapter_scale=ip_adapter_scale,
            height=height,
            width=width,
            num_frames=num_frames,
            output_type=output_type,
        )
        request = check_request(self.bundle.manifest, asked)
        stream = noise_of(seed, generator, request.images)
        self.check_steps(num_inference_steps)
        for name, function in (("callback", callback), ("callback_on_step_end", callback_on_step_end)):
            if function is not None:
                arguments.function(name, function)
        watch = _Watch(callback, callback_on_step_end, tuple(callback_on_step_end_tensor_inputs))
        plain = not arguments.flag("return_dict", return_dict)
        with self._loaded.alone("call"):
            output = self._draw(request, stream, watch, start)
        return (output.images,) if plain else output  # type: ignore[return-value]

    def _draw(self, request: Request, stream: Noise, watch: _Watch, start: float) -> PipelineOutput:
        loading = time.perf_counter()
        self.say_what_the_fit_had_not(request.guidance_scale, request.size)
        if not self._loaded.lazy:
            self._loaded.all_of(self.bundle)
        encoding = time.perf_counter()
        drawn = self._drawn(request, stream)
        denoising = time.perf_counter()
        denoised, launches = self._denoise(request, drawn, stream, watch)
        decoding = time.perf_counter()
        images = self._images(request, denoised)
        end = time.perf_counter()
        timings = Timings(
            load=encoding - loading,
            text=denoising - encoding,
            loop=decoding - denoising,
            decode=end - decoding,
            total=end - start,
        )
        frames = self.bundle.manifest.latent.video_frames
        return PipelineOutput(images=images, latents=denoised, timings=timings, launches=launches, frames=frames)

    def say_what_the_fit_had_not(self, guidance_scale: float, extents: Sequence[int]) -> None:
        """One line in the log where a fitted solver runs with what it was not fitted to; each line once.

        extents: of the latent, [frames,] height and width.
        """
        if self._fitted_to is None:
            return
        manifest = self.bundle.manifest
        guided = manifest.guidance or any(spec.source == "guidance" for spec in manifest.conditions)
        line = self._fitted_to.beyond(
            guidance_scale if guided else None,
            (extents[-2], extents[-1]),
            lora=any(choice.scale for choice in self._loaded.loras),
            scale=manifest.latent.scale or 1,
        )
        if line and line not in self._said:
            self._said.add(line)
            _log.warning("%s: its solver %s: compare the pictures with the full run's", self.bundle.path, line)

    def check_steps(self, steps: object) -> None:
        """Refuse (UserError) another number of steps than the sampler was compiled with."""
        own = self.bundle.manifest.sampler.num_inference_steps
        if steps is not None and arguments.whole("num_inference_steps", steps, least=1) != own:
            offered = ", ".join(self.bundle.schedules)
            others = f"; its schedules are {offered}, see with_schedule" if offered else ""
            raise UserError(
                f"num_inference_steps: {steps}, and the engine directory was compiled for {own}{others}; leave it out, "
                "or export a schedule of so many"
            )

    def _end_step(self, loop: DenoisingLoop, index: int, watch: _Watch) -> None:
        """Call back after the last launch of an evaluation."""
        assert watch.step_ended is not None
        launches = loop.launches
        if index + 1 < len(launches) and launches[index + 1].step == launches[index].step:
            return
        tensors = {"latents": loop.latents_after(index)} if "latents" in watch.tensors else {}
        watch.step_ended(self, launches[index].step, launches[index].timestep, tensors)

    def own_loop(self) -> DenoisingLoop:
        """A loop over the graphs of this pipeline with buffers of its own, for a caller that walks through it.

        It is of no use any more once ``changes`` is another number.

        Raises:
            UserError: a graph cannot be loaded.
        """
        with self._loaded.alone("own_loop"):
            return self._loaded.another_loop(self.bundle)

    @property
    def changes(self) -> int:
        """How often the graphs were let go of: by a LoRA, or by ``close``."""
        return self._loaded.drops

    def close(self) -> None:
        """Let go of all that is loaded, also by other pipelines of this directory's schedules; a further call loads it
        again."""
        with self._loaded.alone("close"):
            self._loaded.drop_all()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        manifest = self.bundle.manifest
        named = f", schedule {manifest.name}" if manifest.name else ""
        launches = len(manifest.plan.launched)
        return (
            f"<Pipeline {self.bundle.path}: {manifest.model.name} on {self.backend.name}, {launches} launches{named}>"
        )

    def self_test(self) -> SelfTestReport:
        """Does this backend on this machine compute the model? Runs the test that the engine directory carries.

        Raises:
            UserError: it carries none, a LoRA is loaded, or a run failed.
        """
        with self._loaded.alone("self_test"):
            if any(choice.scale for choice in self._loaded.loras):
                raise UserError("self_test: a LoRA is loaded, and the test is of the model without; unload it first")
            test = read_self_test(self.bundle)
            return run_self_test(test, self._loaded.loop(self.bundle))

    def tokens(self, prompt: str, *, negative: bool = False) -> dict[str, np.ndarray]:
        """What the text encoders get of a prompt, by graph input name: token ids and masks, int64 (1, length)."""
        return self._loaded.text(self.bundle).tokens(prompt, negative=negative)

    def conditions(self, request: Request, seed: int = 0) -> Conditions:
        """Per condition its (unconditional, conditional) rows, one for each image; the former None without guidance.

        seed: of the call, which latents of pictures are drawn from.
        """
        return self._drawn(request, TorchNoise(seed)).conditions

    def _drawn(self, request: Request, stream: Noise) -> _Drawn:
        """All that the loop starts from, drawn in the order of diffusers' pipelines."""
        conditions = self._undrawn(request)
        picture = self._picture(request, stream)
        # What a pipeline draws without its generator comes from torch's own, of the same seed.
        apart = TorchNoise(stream.seed)
        conditions |= self._encoded_pictures(request, apart, ("apart",))
        conditions |= self._encoded_pictures(request, stream, ("no", "before"))
        shape = (request.images, self.bundle.manifest.latent.channels, *request.size)
        latents = stream.randn(shape) if request.latents is None else request.latents
        conditions |= self._encoded_pictures(request, stream, ("after",))
        return _Drawn(conditions, picture, latents)

    def _undrawn(self, request: Request) -> Conditions:
        """The conditions that nothing is drawn for."""
        conditions: Conditions = {}
        guidance = self.bundle.manifest.guidance
        if request.text is not None:
            conditions.update(self._text_rows(request.text))
        spec = class_condition(self.bundle.manifest)
        if request.classes is not None and spec is not None:
            null = np.full_like(request.classes, request.null_class) if guidance else None
            conditions[spec.name] = (null, request.classes)
        for name, rows in request.fixed.items():
            conditions[name] = (request.null.get(name, rows) if guidance else None, rows)
        return conditions

    def _text_rows(self, text: TextRequest) -> dict[str, tuple[np.ndarray | None, np.ndarray]]:
        positive = self._encode(text.prompts) if text.embeds is None else text.embeds
        assert positive is not None  # a request has prompts or embeddings
        negative = text.negative_embeds
        if negative is None:
            negative = self._encode(text.negative_prompts, negative=True)
        if negative is None and self.bundle.manifest.guidance:
            negative = {name: np.zeros_like(rows) for name, rows in positive.items()}
        return {name: (None if negative is None else negative[name], rows) for name, rows in positive.items()}

    def _encode(self, prompts: tuple[str, ...] | None, *, negative: bool = False) -> dict[str, np.ndarray] | None:
        if prompts is None:
            return None
        encoded = self._loaded.text(self.bundle)(prompts, negative=negative)
        for name, spec in text_conditions(self.bundle.manifest).items():
            if not fits(encoded[name], spec.dtype):
                raise self._not_finite(f"text encoder, output {name}")
        return encoded

    def _picture(self, request: Request, stream: Noise) -> np.ndarray | None:
        """Latents of the pictures to start from (images, C, h, w), drawn from the encoder's distribution."""
        latents: np.ndarray | None = request.image_latents
        if self.bundle.manifest.sampler.strength is None:
            shown = [spec for spec in picture_conditions(self.bundle.manifest) if spec.picture.start_drawn]
            if shown and request.latents is None:
                # Latents that diffusers draws and adds to noise with the weight 0.
                stream.randn((len(request.encoded.get(shown[0].name, (1,))), *shown[0].shape[1:]))
        elif request.image is not None:
            mean, deviation = self._encoded(request.image)
            latents = mean if deviation is None else mean + deviation * stream.randn(mean.shape)
        return None if latents is None else _of_each(latents, request.images)

    def _encoded_pictures(self, request: Request, stream: Noise, drawn: tuple[str, ...]) -> Conditions:
        """Conditions that are latents or embeddings of pictures, those of these ways of drawing."""
        conditions: Conditions = {}
        for spec in picture_conditions(self.bundle.manifest):
            pictures = request.encoded.get(spec.name)
            if pictures is None or spec.picture.drawn not in drawn:
                continue
            if spec.picture.form in ("embeds", "states"):
                conditions[spec.name] = self._embedded(spec, pictures, request.images)
                continue
            mean, deviation = self._encoded(pictures)
            guided, both = self.bundle.manifest.guidance, spec.picture.drawn == "apart"
            count = request.images * (2 if guided and both else 1)
            if spec.picture.each:
                mean = _of_each(mean, count)
                deviation = None if deviation is None else _of_each(deviation, count)
            latents: np.ndarray = mean + np.float32(spec.picture.offset)
            if deviation is not None and spec.picture.drawn != "no":
                latents = latents + deviation * stream.randn(mean.shape)
            rows = _of_each(latents, count)
            if not fits(rows, spec.dtype):
                raise self._not_finite(f"VAE encoder, {spec.name}")
            conditions[spec.name] = (rows[: request.images] if guided else None, rows[-request.images :])
        return conditions

    def _embedded(self, spec: ConditionSpec, pictures: np.ndarray, images: int) -> tuple[np.ndarray | None, np.ndarray]:
        found = self._loaded.image_encoder(self.bundle)(pictures)
        # Where it gives nothing for none, the picture is in both halves.
        rows, nothing = (_of_each(found.get(name, found[EMBEDS]), images) for name in (EMBEDS, NO_EMBEDS))
        if not fits(rows, spec.dtype):
            raise self._not_finite(f"image encoder, {spec.name}")
        return (nothing if self.bundle.manifest.guidance else None), rows

    def _encoded(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Mean and standard deviation of the latents of pictures; the latter None for a deterministic VAE."""
        encoded = self._loaded.encoder(self.bundle)(pictures)
        if not all(np.isfinite(rows).all() for rows in encoded.values()):
            raise self._not_finite("VAE encoder")
        return encoded["mean"], encoded.get("std")

    def _denoise(
        self,
        request: Request,
        drawn: _Drawn,
        stream: Noise,
        watch: _Watch,
    ) -> tuple[np.ndarray, int]:
        """All images in batches of at most the exported size; where that is not open, the last one padded to it.

        Returns latents and launches.
        """
        loop = self._loaded.loop(self.bundle)
        manifest = self.bundle.manifest
        most = manifest.batch
        latents, picture = drawn.latents, drawn.picture
        noises = [stream.randn(latents.shape) for _ in range(manifest.plan.noises)]
        starts = range(0, request.images, most)
        total = len(starts) * len(loop.launches)
        parts = []
        for number, start in enumerate(starts):
            rows = slice(start, start + most)
            batch = batch_for(min(most, request.images - start), most, manifest.sizes)

            def launched(index: int, done: int = number * len(loop.launches)) -> None:
                if watch.launched is not None:
                    watch.launched(done + index + 1, total)
                if watch.step_ended is not None:
                    self._end_step(loop, index, watch)

            inputs = {
                name: np.concatenate([pad_batch(half[rows], batch) for half in halves if half is not None])
                for name, halves in drawn.conditions.items()
            }
            with np.errstate(over="ignore", invalid="ignore"):  # said below
                denoised = loop.run(
                    pad_batch(latents[rows], batch),
                    inputs,
                    noises=np.stack([pad_batch(noise[rows], batch) for noise in noises]) if noises else None,
                    image=None if picture is None else pad_batch(picture[rows], batch),
                    guidance_scale=request.guidance_scales,
                    on_launch=launched if watch.any else None,
                )
            if not np.isfinite(denoised).all():
                raise self._not_finite(loop.not_finite() or "the last sum of all predictions")
            for spec in picture_conditions(manifest):
                if spec.picture.kept:
                    frames = inputs[spec.name].shape[2]
                    denoised[:, :, :frames] = inputs[spec.name][-batch:]
            parts.append(denoised[: request.images - start])
        return np.concatenate(parts), total

    def _images(self, request: Request, latents: np.ndarray) -> Any:
        if request.output_type == "latent":
            return latents
        images = self._loaded.decoder(self.bundle)(latents)
        if not np.isfinite(images).all():
            raise self._not_finite("VAE decoder")
        if request.output_type == "np":
            return images
        if request.output_type == "pt":
            return sys.modules["torch"].from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, -3)))
        return to_pil(images.reshape(-1, *images.shape[-3:]))

    def _not_finite(self, first: str) -> NotFiniteError:
        """The error for a run whose first values that are not finite came from ``first``."""
        dtype = self.bundle.manifest.dtype
        helps = ["a smaller LoRA scale"] if self._loaded.loras else []
        helps += ["a smaller guidance scale"] if self.bundle.manifest.guidance and not first.startswith("text") else []
        helps += ["an export with --dtype fp32 or bf16"] if dtype == "fp16" else []
        helps += ["dipgo-run --verify, which finds damaged weights"]
        return NotFiniteError(
            f"{self.bundle.path}: {first}: the first output that is not finite (NaN or infinity), so there is no"
            f" picture; what may help: {', '.join(helps)}"
        )


def _of_each(rows: np.ndarray, images: int) -> np.ndarray:
    """The rows of pictures, one for each image; those of one prompt follow each other."""
    return np.repeat(rows, images // len(rows), axis=0)


def _fitted_to(bundle: Bundle) -> FittedTo | None:
    """What the solver of the directory's schedule was fitted to; None where it has none."""
    manifest = bundle.manifest
    solver = bundle.load_schedule().solver if manifest.schedule in manifest.files else None
    return None if solver is None else solver.fitted_to


def _lora_choices(files: Sequence[tuple[Any, ...]], partial: bool) -> list[LoraChoice]:
    found = []
    for pair in arguments.items("lora", files, "pairs of a file and a scale"):
        if not isinstance(pair, (tuple, list)) or len(pair) not in (2, 3):
            raise arguments.wrong("lora", pair, "pairs of a file and a scale")
        file, scale = arguments.path("lora file", pair[0]), arguments.number("lora scale", pair[1])
        denoiser = arguments.text("lora denoiser", pair[2]) if len(pair) == 3 else ""
        found.append(LoraChoice(file, scale, partial, denoiser))
    return found
