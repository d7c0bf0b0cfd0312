"""The sides of a comparison that run in torch: the supernet under the schedule, and diffusers' own pipeline."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from dipgo_deploy.compare.loop import predictions_used
from dipgo_deploy.compare.sides import Cache, Crossed, Given, State
from dipgo_deploy.compare.stock import Case, StockPipeline
from dipgo_deploy.models.packed import PACK, unpack
from dipgo_deploy.reference.conditions import ReferenceInputs, host
from dipgo_deploy.reference.recording import as_read
from dipgo_deploy.reference.vae import decoded, to_images
from dipgo_deploy.sampler.start import ImageStart
from dipgo_deploy.supernet.gated import CacheState
from dipgo_deploy.supernet.loop import Evaluation, guided_step

if TYPE_CHECKING:
    from dipgo_deploy.bundle.manifest import Manifest
    from dipgo_deploy.reference.load import Reference
    from dipgo_deploy.schedule.kinds import CacheKind


@dataclass(frozen=True)
class _Held:
    """The supernet's stored values. kinds: of caches by block."""

    state: CacheState
    kinds: Mapping[str, CacheKind]

    def get(self, cache: Cache, stored: int) -> np.ndarray | None:
        """As ``Caches`` has it."""
        place = self.place(cache, stored)
        return None if place is None else host(self.state.stored(cache.block)[place][cache.index])

    def place(self, cache: Cache, stored: int) -> int | None:
        """Which of the values that are held of a block it is, 0 the last."""
        held = self.state.stored(cache.block)
        if not held or self.kinds.get(cache.block) != cache.kind or cache.index >= len(held[0]):
            return None
        steps = self.state.stored_at.get(cache.block, ())
        return next((place for place, step in enumerate(steps) if step <= stored), None) if steps else 0


class ModelSide:
    """The model in torch under the schedule of an engine directory."""

    def __init__(self, reference: Reference, name: str = "the supernet") -> None:
        self.name = name
        self.rows = len(reference.schedule.gates)
        self._reference = reference
        self._kinds = dict(reference.schedule.cache_kinds)
        self._used = predictions_used(reference)
        self._final: torch.Tensor | None = None

    def walk(self, given: Given) -> Iterator[State]:
        """As ``compare.sides.Side`` has it."""
        self._inputs = inputs = _inputs(self._reference, given)
        loop = self._reference.walk(inputs)
        held: np.ndarray | None = None
        while True:
            with torch.no_grad():
                try:
                    self._now = at = next(loop)
                except StopIteration as end:
                    self._final = end.value
                    return
            prediction = host(at.prediction) if self._used[at.step] else None
            yield State(
                at.step,
                "model",
                host(at.model_input),
                _Held(at.before, self._kinds),
                _Held(at.after, self._kinds),
                held,
                prediction,
                self._written(at),
            )
            held = prediction if prediction is not None else held

    def on(self, other: State) -> Crossed | None:
        """As ``compare.sides.Side`` has it."""
        if other.latent is None:
            return None
        at = self._now
        with torch.no_grad():
            _, prediction, after = guided_step(
                self._reference.supernet,
                torch.from_numpy(other.latent).to(at.model_input),
                at.timestep,
                self._inputs.conditions,
                self._reference.schedule.gates[at.step],
                self._with(at, other),
                at.step,
                self._inputs.guidance_scale,
            )
        return Crossed(host(prediction), _Held(after, self._kinds))

    def final(self) -> np.ndarray:
        """As ``compare.sides.Side`` has it."""
        assert self._final is not None
        return host(self._final)

    def decode(self, latents: np.ndarray) -> np.ndarray | None:
        """As ``compare.sides.Side`` has it."""
        source = self._reference.source
        vae = getattr(source.pipeline, "vae", None)
        if vae is None or source.family.pixels:
            return None
        with torch.no_grad():
            return host(to_images(decoded(vae, torch.from_numpy(latents))))

    def _written(self, at: Evaluation) -> tuple[Cache, ...]:
        row = self._reference.schedule.gates[at.step]
        return tuple(
            Cache(kind, block, index)
            for (block, kind), kept in zip(self._kinds.items(), row, strict=True)
            if kept
            for index in range(len(at.after.tensors.get(block, ())))
        )

    def _with(self, at: Evaluation, other: State) -> CacheState:
        """The stored values before the present evaluation, the other side's in their place where it has them."""
        own = _Held(at.before, self._kinds)

        def of(block: str, place: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            steps = at.before.stored_at.get(block, ())
            stored = steps[place] if steps else at.step
            found = []
            for index, tensor in enumerate(tensors):
                array = other.before.get(Cache(own.kinds[block], block, index), stored)
                array = None if array is None else as_read(array, tensor.shape)
                fits = array is not None and array.shape == tuple(tensor.shape)
                found.append(torch.from_numpy(array).to(tensor) if fits else tensor)
            return found

        state = at.before
        return replace(
            state,
            tensors={block: of(block, 0, tensors) for block, tensors in state.tensors.items()},
            earlier={
                block: tuple(of(block, place, tensors) for place, tensors in enumerate(older, start=1))
                for block, older in state.earlier.items()
            },
        )


class StockSide:
    """diffusers' own pipeline with its own denoiser, under no schedule: what a schedule leaves out shows beside it.

    It is run whole when its loop is walked, from the seed of ``case``; the noise that it draws is its own.

    Raises:
        UserError: the pipeline cannot do what the engine directory does, or evaluates its denoiser more or less often
            than the engine directory has evaluations.
    """

    def __init__(self, manifest: Manifest, reference: Reference, case: Case) -> None:
        stock = StockPipeline(manifest, reference)
        self.name = "the stock pipeline"
        self._reference, self._case = reference, stock.possible(case)
        self._run = stock.plain(self._case)
        self.rows = len(self._run.steps)
        self._shape = (manifest.batch, *manifest.latent.shape)

    def walk(self, given: Given) -> Iterator[State]:
        """As ``compare.sides.Side`` has it."""
        self._inputs = _inputs(self._reference, given)
        held: np.ndarray | None = None
        nothing = _Held(CacheState(), {})
        for step, (_, seen, made) in enumerate(self._run.steps):
            self._step = step
            latent, prediction = self._whole(seen), self._whole(made)
            yield State(step, "pipeline", latent, nothing, nothing, held, prediction)
            held = prediction

    def on(self, other: State) -> Crossed | None:
        """As ``compare.sides.Side`` has it."""
        if other.latent is None:
            return None
        inputs, supernet = self._inputs, copy.copy(self._reference.supernet)
        supernet.guidance = None
        with torch.no_grad():
            _, prediction, _ = guided_step(
                supernet,
                torch.from_numpy(other.latent).to(inputs.latents),
                torch.tensor(self._run.steps[self._step][0]),
                inputs.conditions,
                (True,) * len(supernet.specs),
                CacheState(),
                self._step,
                inputs.guidance_scale,
            )
        return Crossed(host(prediction), _Held(CacheState(), {}))

    def final(self) -> np.ndarray:
        """As ``compare.sides.Side`` has it."""
        assert self._run.latents is not None  # of a call that was not stopped
        return self._run.latents

    def decode(self, latents: np.ndarray) -> np.ndarray | None:
        """The pipeline's own images, which ``latents`` are those of."""
        return self._run.images

    def _whole(self, tensor: np.ndarray) -> np.ndarray:
        """(B, C, h, w) of what a pipeline may hold as tokens, two by two latent pixels each, or twice for guidance."""
        tensor = tensor[-self._shape[0] :]
        if tensor.shape == self._shape or tensor.ndim != 3:
            return tensor
        extents = (extent // PACK for extent in self._shape[2:])
        return host(unpack(torch.from_numpy(tensor), *extents))


def _inputs(reference: Reference, given: Given) -> ReferenceInputs:
    start = None
    if reference.begin is not None and given.picture is not None:
        start = ImageStart(reference.begin, torch.from_numpy(given.picture))
    guided = reference.source.guided and any(spec.shape[0] > len(given.latents) for spec in reference.conditions)
    return ReferenceInputs(
        torch.from_numpy(given.latents),
        tuple(map(torch.from_numpy, given.draws)),
        {name: torch.from_numpy(rows) for name, rows in given.conditions.items()},
        given.guidance_scale if guided else None,
        start,
    )
