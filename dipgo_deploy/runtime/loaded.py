"""What is loaded of an engine directory: once, also where pipelines of several of its schedules use it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from dipgo_deploy.backends.base import Backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.errors import UserError
from dipgo_deploy.lora.file import LoraChoice
from dipgo_deploy.runtime.graphs import Graphs
from dipgo_deploy.runtime.image import Decoder, Encoder
from dipgo_deploy.runtime.loop import DenoisingLoop
from dipgo_deploy.runtime.text import TextEncoder

if TYPE_CHECKING:
    from dipgo_deploy.lora.merge import LoraReport, MergedWeights

T = TypeVar("T", TextEncoder, Decoder, Encoder)


class Loaded:
    """Graphs, text encoder and VAE on a backend, loaded when they are first asked for, and the LoRAs in their weights.

    backend: what runs them. lazy: each graph of the denoiser is loaded when it is first launched. loras: in order.
    drops: how often the graphs were let go of.
    """

    def __init__(self, backend: Backend, *, lazy: bool) -> None:
        self.backend = backend
        self.lazy = lazy
        self.loras: list[LoraChoice] = []
        self._weights: MergedWeights | None = None
        self._graphs = Graphs(backend)
        self.drops = 0
        self._loops: dict[str, DenoisingLoop] = {}
        self._text: TextEncoder | None = None
        self._decoder: Decoder | None = None
        self._encoder: Encoder | None = None
        self._image_encoder: Encoder | None = None
        self._lock = threading.RLock()
        self._busy = False

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Only one thread at a time is inside; a callback of a call that is running must not come in, either."""
        with self._lock:
            if self._busy:
                raise UserError(f"{what}: called by the callback of a call of the same pipeline; use another pipeline")
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    def all_of(self, bundle: Bundle) -> None:
        """Load everything that a run of this schedule may need. Raises UserError for a graph that cannot be loaded."""
        components = bundle.manifest.components
        self.loop(bundle, lazy=False).load()
        if components.text_encoder is not None:
            self.text(bundle)
        if components.vae_decoder is not None:
            self.decoder(bundle)
        if components.vae_encoder is not None:
            self.encoder(bundle)
        if components.image_encoder is not None:
            self.image_encoder(bundle)

    def loop(self, bundle: Bundle, *, lazy: bool | None = None) -> DenoisingLoop:
        """The loop of a schedule, with buffers of its own; graphs that another schedule has loaded are used."""
        found = self._loops.get(bundle.manifest.name)
        if found is None:
            found = self._loops[bundle.manifest.name] = self.another_loop(bundle, lazy=lazy)
        return found

    def another_loop(self, bundle: Bundle, *, lazy: bool | None = None) -> DenoisingLoop:
        """A loop that is kept by the caller: it is of no use any more once ``drops`` is another number."""
        return DenoisingLoop(bundle, self.backend, lazy=self.lazy if lazy is None else lazy, graphs=self._graphs)

    def graphs_loaded(self, bundle: Bundle) -> int:
        """How many variants of a schedule are loaded."""
        return len({variant.graph.file for variant in bundle.manifest.plan.variants} & self._graphs.files)

    def text(self, bundle: Bundle) -> TextEncoder:
        """The text encoder of a directory that has one."""
        if self._text is None:
            entry = bundle.manifest.components.text_encoder
            assert entry is not None  # a request with prompts was checked to have an encoder
            self._text = _unchanged(bundle, TextEncoder(bundle.path, entry, self.backend, self._weights))
        return self._text

    def decoder(self, bundle: Bundle) -> Decoder:
        """The VAE's decoder of a directory that has one."""
        if self._decoder is None:
            self._decoder = _unchanged(bundle, Decoder(bundle.path, bundle.manifest.components, self.backend))
        return self._decoder

    def encoder(self, bundle: Bundle) -> Encoder:
        """The VAE's encoder of a directory that has one."""
        if self._encoder is None:
            components = bundle.manifest.components
            encoder = Encoder(bundle.path, components.encoders, self.backend, components.vae_encoder_chunks)
            self._encoder = _unchanged(bundle, encoder)
        return self._encoder

    def image_encoder(self, bundle: Bundle) -> Encoder:
        """The encoder of an IP-Adapter's pictures of a directory that has one."""
        if self._image_encoder is None:
            graph = bundle.manifest.components.image_encoder
            assert graph is not None  # checked with the request
            self._image_encoder = _unchanged(bundle, Encoder(bundle.path, (graph,), self.backend))
        return self._image_encoder

    @property
    def reports(self) -> tuple[LoraReport, ...]:
        """What became of each LoRA that is loaded, in order."""
        return () if self._weights is None else self._weights.reports

    def change_weights(self, bundle: Bundle, loras: list[LoraChoice]) -> tuple[LoraReport, ...]:
        """Drop what is loaded, and load as much again with other weights; on an error all stays as it was."""
        weights = None
        if loras:
            from dipgo_deploy.lora.merge import merge_loras

            weights = merge_loras(bundle, loras)
        before = self.loras, self._weights
        schedules = [loop.bundle for loop in self._loops.values()]
        with_text = self._text is not None
        self._drop()  # before the new ones are there: both at once would take twice the memory
        try:
            self._with(loras, weights)
            self._load(bundle, schedules, with_text)
        except UserError:
            self._drop()
            self._with(*before)
            self._load(bundle, schedules, with_text)
            raise
        return self.reports

    def _with(self, loras: list[LoraChoice], weights: MergedWeights | None) -> None:
        self.loras, self._weights = loras, weights
        self._graphs = Graphs(self.backend, weights)

    def _load(self, bundle: Bundle, schedules: list[Bundle], with_text: bool) -> None:
        for schedule in schedules:
            self.loop(schedule)
        if with_text:
            self.text(bundle)

    def drop_all(self) -> None:
        """Let go of everything; the LoRAs stay chosen."""
        self._drop()
        self._decoder = self._encoder = self._image_encoder = None

    def _drop(self) -> None:
        """All that a LoRA changes."""
        self.drops += 1
        self._graphs.release_all()
        self._loops.clear()
        self._text = None


def _unchanged(bundle: Bundle, loaded: T) -> T:
    bundle.check_unchanged()
    return loaded
