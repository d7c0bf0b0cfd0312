"""Prompt or class label -> picture, from an engine directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.backends import create_backend
from dipgo_deploy.backends.base import Backend
from dipgo_deploy.backends.tensorrt_queue import GraphMode
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.runtime.image import Decoder, pad_batch, to_pil
from dipgo_deploy.runtime.loop import DenoisingLoop
from dipgo_deploy.runtime.noise import TorchNoise
from dipgo_deploy.runtime.requests import CLASSES, Asked, OutputType, Request, TextRequest, check_request
from dipgo_deploy.runtime.text import TextEncoder

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Timings:
    """Seconds of one call. ``load`` is 0 once everything is loaded."""

    load: float
    text: float
    loop: float
    decode: float
    total: float


@dataclass(frozen=True)
class PipelineOutput:
    """What a call gives.

    images: pictures (``pil``), float32 (n, H, W, 3) in [0, 1] (``np``), or the latents again (``latent``). latents:
    float32 (n, C, h, w). launches: graph launches of the whole call.
    """

    images: list[Image] | np.ndarray
    latents: np.ndarray
    timings: Timings
    launches: int


class Pipeline:
    """An engine directory ready to draw. Not for two threads at once; make one pipeline for each.

    Nothing is loaded before it is needed: call ``load`` to pay for it ahead of the first picture.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self.backend = backend
        self._loop: DenoisingLoop | None = None
        self._text: TextEncoder | None = None
        self._decoder: Decoder | None = None

    @classmethod
    def from_engine_dir(
        cls,
        engine_dir: Path | str,
        backend: str = "auto",
        *,
        threads: int | None = None,
        share_weights: bool = False,
        cuda_graph: GraphMode = "off",
        verify: bool = False,
        lazy: bool = False,
    ) -> Pipeline:
        """Open an engine directory made by ``dipgo-export``.

        Args:
            engine_dir: the directory.
            backend: ``auto``, ``cpu``, ``cuda``, ``tensorrt`` or ``tensorrt-rtx``.
            threads: CPU threads of one launch; None: the backend's default.
            share_weights: one copy of the weights for all graphs, at the price of slower products on the CPU.
            cuda_graph: TensorRT's launches as captured graphs: ``off``, one for each ``step``, or one ``loop``.
            verify: check the sha256 of every file first.
            lazy: load graphs at the first call only, after its arguments were checked.

        Raises:
            UserError: the directory is wrong or damaged, or the backend cannot run it here.
        """
        bundle = Bundle.open(Path(engine_dir), verify=verify)
        created = create_backend(backend, threads=threads, share_weights=share_weights, cuda_graph=cuda_graph)
        created.check(bundle.manifest)
        pipeline = cls(bundle, created)
        if not lazy:
            pipeline.load()
        return pipeline

    def load(self) -> None:
        """Load and bind the denoiser's graphs, the text encoder and the VAE decoder, where not done yet.

        Raises:
            UserError: a graph cannot be loaded.
        """
        components = self.bundle.manifest.components
        if self._loop is None:
            self._loop = DenoisingLoop(self.bundle, self.backend)
        if self._text is None and components.text_encoder is not None:
            self._text = TextEncoder(self.bundle.path, components.text_encoder, self.backend)
        if self._decoder is None and components.vae_decoder is not None:
            self._decoder = Decoder(self.bundle.path, components.vae_decoder, self.backend)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        latents: np.ndarray | None = None,
        prompt_embeds: np.ndarray | None = None,
        negative_prompt_embeds: np.ndarray | None = None,
        output_type: OutputType = "pil",
        callback: Callable[[int, int], Any] | None = None,
    ) -> PipelineOutput:
        """Draw pictures.

        Args:
            prompt: one or several prompts, for a text model.
            negative_prompt: one, or one for each prompt; default "".
            class_labels: class ids or names, for a class model.
            num_images_per_prompt: pictures for each prompt or class label; those of one prompt follow each other.
            seed: all initial latents are drawn from it in one draw, then the sampler's noise, as diffusers does with
                ``torch.Generator("cpu").manual_seed(seed)`` for a pipeline in float32.
            guidance_scale: at least 1; default: the engine directory's.
            latents: initial unit noise (n, C, h, w), instead of the seed's.
            prompt_embeds: text embeddings (prompts, L, D), instead of prompts.
            negative_prompt_embeds: the same for the negative prompt; one or one for each prompt.
            output_type: ``pil``, ``np`` or ``latent``.
            callback: called with (launches done, launches in all) after each launch.

        Raises:
            UserError: an argument does not fit the engine directory (checked before anything runs), or a run failed.
        """
        start = time.perf_counter()
        asked = Asked(
            prompt=prompt,
            negative_prompt=negative_prompt,
            class_labels=class_labels,
            num_images_per_prompt=num_images_per_prompt,
            guidance_scale=guidance_scale,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
        )
        request = check_request(self.bundle.manifest, asked)
        stream = TorchNoise(seed)
        loading = time.perf_counter()
        self.load()
        encoding = time.perf_counter()
        conditions = self._conditions(request)
        denoising = time.perf_counter()
        denoised, launches = self._denoise(request, conditions, stream, callback)
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
        return PipelineOutput(images=images, latents=denoised, timings=timings, launches=launches)

    def _conditions(self, request: Request) -> dict[str, tuple[np.ndarray | None, np.ndarray]]:
        """Per condition its (unconditional, conditional) rows, one for each image; the former None without guidance."""
        conditions: dict[str, tuple[np.ndarray | None, np.ndarray]] = {}
        guidance = self.bundle.manifest.guidance
        if request.text is not None:
            conditions[request.text.name] = self._text_rows(request.text)
        if request.classes is not None:
            null = np.full_like(request.classes, request.null_class) if guidance else None
            conditions[CLASSES] = (null, request.classes)
        return conditions

    def _text_rows(self, text: TextRequest) -> tuple[np.ndarray | None, np.ndarray]:
        positive = self._encode(text.prompts) if text.embeds is None else text.embeds
        assert positive is not None  # a request has prompts or embeddings
        negative = self._encode(text.negative_prompts) if text.negative_embeds is None else text.negative_embeds
        return negative, positive

    def _encode(self, prompts: tuple[str, ...] | None) -> np.ndarray | None:
        if prompts is None:
            return None
        assert self._text is not None  # a request with prompts was checked to have an encoder
        return self._text(prompts)

    def _denoise(
        self,
        request: Request,
        conditions: dict[str, tuple[np.ndarray | None, np.ndarray]],
        stream: TorchNoise,
        callback: Callable[[int, int], Any] | None,
    ) -> tuple[np.ndarray, int]:
        """All images in batches of the exported size, the last one padded. Returns latents and launches."""
        assert self._loop is not None
        loop = self._loop
        batch = self.bundle.manifest.batch
        shape = (request.images, *loop.sample_shape[1:])
        latents = stream.randn(shape) if request.latents is None else request.latents
        noises = [stream.randn(shape) for _ in range(self.bundle.manifest.plan.noises)]
        starts = range(0, request.images, batch)
        total = len(starts) * len(loop.launches)
        parts = []
        for number, start in enumerate(starts):
            rows = slice(start, start + batch)

            def launched(index: int, done: int = number * len(loop.launches)) -> None:
                if callback is not None:
                    callback(done + index + 1, total)

            inputs = {
                name: np.concatenate([pad_batch(half[rows], batch) for half in halves if half is not None])
                for name, halves in conditions.items()
            }
            denoised = loop.run(
                pad_batch(latents[rows], batch),
                inputs,
                noises=np.stack([pad_batch(noise[rows], batch) for noise in noises]) if noises else None,
                guidance_scale=request.guidance_scale,
                on_launch=None if callback is None else launched,
            )
            parts.append(denoised[: request.images - start])
        return np.concatenate(parts), total

    def _images(self, request: Request, latents: np.ndarray) -> list[Image] | np.ndarray:
        if request.output_type == "latent":
            return latents
        assert self._decoder is not None  # checked with the request
        images = self._decoder(latents)
        return to_pil(images) if request.output_type == "pil" else images
