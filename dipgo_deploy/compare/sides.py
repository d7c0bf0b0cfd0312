"""Two sides of a comparison, evaluation by evaluation: engine directories on backends, or the model in torch.

Torch-free; the sides in torch are in ``compare.torch_sides``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dipgo_deploy.backends.base import Backend
from dipgo_deploy.backends.storage import as_bytes, from_storage, to_storage
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.history import final_latent
from dipgo_deploy.bundle.names import HISTORY, PREDICTION, parse_cache
from dipgo_deploy.reference.conditions import DEFAULT_GUIDANCE_SCALE, LABEL, PROMPT
from dipgo_deploy.reference.recording import as_read
from dipgo_deploy.runtime.image import Decoder
from dipgo_deploy.runtime.loop import DenoisingLoop
from dipgo_deploy.runtime.noise import TorchNoise, loop_noise
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.runtime.requests import Asked, check_request, class_condition, text_conditions
from dipgo_deploy.runtime.self_test import sample_shape
from dipgo_deploy.schedule.guidance import HALVES

if TYPE_CHECKING:
    from dipgo_deploy.bundle.manifest import LaunchEntry, TensorSpec, VariantEntry
    from dipgo_deploy.schedule.guidance import Half
    from dipgo_deploy.schedule.kinds import CacheKind


@dataclass(frozen=True)
class Cache:
    """One tensor of a block that evaluations store and read: its kind, the block and the place among its outputs."""

    kind: CacheKind
    block: str
    index: int

    @property
    def name(self) -> str:
        """For tables and messages, as graphs call what they write."""
        return f"new_{'cache' if self.kind == 'output' else 'residual'}.{self.block}/out{self.index}"


class Caches(Protocol):
    """The stored values of a side at one moment."""

    def get(self, cache: Cache, stored: int) -> np.ndarray | None:
        """The value that was stored at evaluation ``stored``, or the last one before it; None where there is none."""
        ...


@dataclass(frozen=True)
class State:
    """A side at one evaluation.

    Attributes:
        launched: names of what was launched, None where nothing was.
        latent: float32 (B, C, h, w) that the denoiser is given; None where it is not called.
        before, after: stored values.
        held: the prediction in use before it, None at the first.
        prediction: the one in use after it, float32 (B, C, h, w).
        written: what it stored, as far as the side says.
    """

    step: int
    launched: str | None
    latent: np.ndarray | None
    before: Caches
    after: Caches
    held: np.ndarray | None
    prediction: np.ndarray | None
    written: tuple[Cache, ...] = ()


@dataclass(frozen=True)
class Given:
    """What both sides start from.

    Attributes:
        latents: float32 (B, C, h, w) unit noise. draws: the sampler's noise. picture: latents of the picture that the
            loop starts from.
        conditions: by the manifest's names, float32 or int64.
        guidance_scale: 1 without guidance.
    """

    latents: np.ndarray
    draws: tuple[np.ndarray, ...]
    picture: np.ndarray | None
    conditions: Mapping[str, np.ndarray]
    guidance_scale: float


@dataclass(frozen=True)
class Crossed:
    """What a side makes of another side's state: the prediction in use, and what it stores."""

    prediction: np.ndarray | None
    after: Caches


class Side(Protocol):
    """What gives a loop, one evaluation at a time."""

    name: str
    rows: int
    """Evaluations of the schedule."""

    def walk(self, given: Given) -> Iterator[State]:
        """The evaluations of its own loop, in order."""
        ...

    def on(self, other: State) -> Crossed | None:
        """What this side makes at its present evaluation of another side's latent, stored values and prediction in use;
        None where the other has no latent and this one needs it."""
        ...

    def final(self) -> np.ndarray:
        """The final latents of the loop that was walked, float32 (B, C, h, w)."""
        ...

    def decode(self, latents: np.ndarray) -> np.ndarray | None:
        """Images float32 (B, [F,] H, W, 3) in [0, 1] of latents; None without a VAE."""
        ...


@dataclass
class _Stored:
    """Values by cache and the evaluation that stored them."""

    values: Mapping[Cache, Mapping[int, np.ndarray]] = field(default_factory=dict)

    def get(self, cache: Cache, stored: int) -> np.ndarray | None:
        """As ``Caches`` has it."""
        held = self.values.get(cache, {})
        known = max((step for step in held if step <= stored), default=None)
        return None if known is None else held[known]


def _with(values: Mapping[int, np.ndarray], step: int, array: np.ndarray, count: int) -> dict[int, np.ndarray]:
    """With one more, of the last ``count``."""
    return dict([*values.items(), (step, array)][-count:])


class EngineSide:
    """An engine directory on a backend, one evaluation launched at a time.

    Raises:
        UserError: the backend cannot run it, or a graph cannot be loaded.
    """

    def __init__(self, bundle: Bundle, backend: Backend, name: str | None = None) -> None:
        self.name = name or f"{bundle.path} on {backend.name}"
        self.bundle = bundle
        self.rows = bundle.manifest.plan.evaluations
        self._backend = backend
        self._loop = DenoisingLoop(bundle, backend, poison=True)
        self._launches: dict[int, list[LaunchEntry]] = {}
        for launch in self._loop.launches:
            self._launches.setdefault(launch.step, []).append(launch)
        # What lies at an offset of the arena, and the evaluation that stored it.
        self._at: dict[int, tuple[Cache, int]] = {}

    def walk(self, given: Given) -> Iterator[State]:
        """As ``Side`` has it."""
        plan = self.bundle.manifest.plan
        self._given, self._arena, self._at = given, None, {}
        self._history = history = np.zeros((plan.slots, *given.latents.shape), np.float32)
        history[0] = given.latents
        if given.draws:
            history[plan.slots - plan.noises :] = np.stack(given.draws)
        if plan.image_slot is not None:
            history[plan.image_slot] = given.picture
        stored: dict[Cache, dict[int, np.ndarray]] = {}
        kept = max([1, *(len(launch.forecast) for launch in self._loop.launches)])
        used: np.ndarray | None = None
        for step in range(self.rows):
            self._step, self._before_arena, self._before_at = step, self._arena, dict(self._at)
            launches, before, held = self._launches.get(step, []), _Stored(dict(stored)), used
            if not launches:
                yield State(step, None, None, before, before, held, used)
                continue
            latent = self._latent(launches)
            prediction, self._arena = self._evaluate(latent, self._arena)
            used = used if prediction is None else prediction
            for launch in launches:
                if launch.slot is not None:
                    history[launch.slot] = prediction
            for launch in launches:
                for offset in launch.writes:
                    self._at.pop(offset, None)
            for cache, offset, _, _ in self._places(launches):
                self._at[offset] = cache, step
            written = self._written(launches, self._arena)
            stored = {
                **stored,
                **{cache: _with(stored.get(cache, {}), step, array, kept) for cache, array in written.items()},
            }
            names = dict.fromkeys(self._variant(launch).name for launch in (launches[0], launches[-1]))
            after = _Stored(stored)
            yield State(step, "..".join(names), latent, before, after, held, used, tuple(written))

    def on(self, other: State) -> Crossed | None:
        """As ``Side`` has it."""
        launches = self._launches.get(self._step, [])
        if not launches:
            return Crossed(other.held, _Stored())
        if other.latent is None:
            return None
        size = self.bundle.manifest.plan.arena_bytes
        arena = np.full(size, 0xFF, np.uint8) if self._before_arena is None else self._before_arena.copy()
        made: set[int] = set()  # offsets that this evaluation itself has written
        for launch in launches:
            for spec, offset in zip(self._specs(launch, "reads"), launch.reads, strict=True):
                known = self._before_at.get(offset)
                half = known is None and launch.reads_second_halves
                if half:
                    known = self._before_at.get(offset - spec.nbytes)
                found = None if offset in made or known is None else other.before.get(*known)
                read = None if found is None else as_read(found, spec.shape, launch.half)
                found = None if half and read is found else read
                if found is not None and found.shape == spec.shape:
                    data = as_bytes(to_storage(found, spec.dtype))
                    arena[offset : offset + data.nbytes] = data
            made |= set(launch.writes)
        prediction, arena = self._evaluate(other.latent, arena)
        written = {cache: {self._step: array} for cache, array in self._written(launches, arena).items()}
        return Crossed(other.held if prediction is None else prediction, _Stored(written))

    def final(self) -> np.ndarray:
        """As ``Side`` has it."""
        return final_latent(self._history, self.bundle.manifest.plan.final)

    def decode(self, latents: np.ndarray) -> np.ndarray | None:
        """As ``Side`` has it."""
        components = self.bundle.manifest.components
        if components.vae_decoder is None:
            return None
        return Decoder(self.bundle.path, components, self._backend)(latents)

    def _variant(self, launch: LaunchEntry) -> VariantEntry:
        return self.bundle.manifest.plan.variants[launch.variant]

    def _specs(self, launch: LaunchEntry, which: str) -> list[TensorSpec]:
        variant = self._variant(launch)
        specs = {spec.name: spec for spec in (*variant.graph.inputs, *variant.graph.outputs)}
        return [specs[name] for name in getattr(variant, which)]

    def _latent(self, launches: Sequence[LaunchEntry]) -> np.ndarray:
        """What the first launch that takes the history makes of it."""
        for launch in launches:
            if HISTORY in {spec.name for spec in self._variant(launch).graph.inputs}:
                return final_latent(self._history, launch.coefficients)
        return np.zeros_like(self._history[0])  # nothing depends on it

    def _evaluate(self, latent: np.ndarray, arena: np.ndarray | None) -> tuple[np.ndarray | None, np.ndarray]:
        return self._loop.evaluate(
            self._step,
            latent,
            self._given.conditions,
            timestep=self._launches[self._step][0].timestep,
            guidance_scale=self._given.guidance_scale,
            arena=arena,
        )

    def _places(self, launches: Sequence[LaunchEntry]) -> Iterator[tuple[Cache, int, TensorSpec, Half | None]]:
        """Where an evaluation leaves the values that blocks store: cache, offset, and of which half of guidance. What
        nobody reads may make room for another launch's within the evaluation."""
        last: dict[int, tuple[TensorSpec, Half | None]] = {}
        for launch in launches:
            written = dict(zip(launch.writes, self._specs(launch, "writes"), strict=True))
            if launch.passes is not None:
                outputs = {spec.name: spec for spec in self._variant(launch).graph.outputs}
                written[launch.passes] = outputs[PREDICTION]
            for offset, spec in written.items():
                end = offset + spec.nbytes
                last = {at: (there, of) for at, (there, of) in last.items() if end <= at or at + there.nbytes <= offset}
            last |= {offset: (spec, launch.half) for offset, spec in written.items()}
        for offset, (spec, half) in last.items():
            name = parse_cache(spec.name)
            if name is not None:
                yield Cache(name.kind, name.block, name.index), offset, spec, half

    def _written(self, launches: Sequence[LaunchEntry], arena: np.ndarray) -> dict[Cache, np.ndarray]:
        """What an evaluation has stored of blocks, with the rows of both halves of guidance where it has both."""
        parts: dict[Cache, dict[Half | None, np.ndarray]] = {}
        for cache, offset, spec, half in self._places(launches):
            parts.setdefault(cache, {})[half] = from_storage(arena[offset:], spec)
        guided = any(launch.half == HALVES[0] for launch in launches)
        order: Sequence[Half | None] = HALVES if guided else (launches[0].half,)
        return {
            cache: np.concatenate([rows[half] for half in order])
            for cache, rows in parts.items()
            if rows.keys() == {*order}
        }


def given_to(
    bundle: Bundle,
    backend: Backend,
    *,
    prompts: Sequence[str] = (),
    labels: Sequence[int] = (),
    guidance_scale: float | None = None,
    seed: int = 0,
) -> Given:
    """Noise of ``seed`` and the conditions that an engine directory makes itself: of a prompt or a class; of pictures,
    and without a text encoder of texts, noise that is the same for everyone.

    Raises:
        UserError: what it cannot be asked for, or its text encoder cannot be run.
    """
    manifest = bundle.manifest
    plan, shape = manifest.plan, sample_shape(manifest)
    stream = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    blind = text_conditions(manifest) if manifest.components.text_encoder is None else {}
    for spec in blind.values():
        row = TorchNoise(0).randn((1, *spec.shape[1:])) if spec.dtype != "int64" else np.ones((1, *spec.shape[1:]))
        made[spec.name] = np.broadcast_to(row, spec.shape).astype(np.int64 if spec.dtype == "int64" else np.float32)
    pictures = {
        spec.name: stream.random((1, *spec.shape[1:]), np.float32)
        for spec in manifest.conditions
        if spec.source == "image"
    }
    known = tuple(spec for spec in manifest.conditions if spec.name not in made)
    manifest = manifest.model_copy(update={"conditions": known})
    scale = manifest.guidance_scale if guidance_scale is None else guidance_scale
    if scale is None and (manifest.guidance or any(spec.source == "guidance" for spec in known)):
        scale = DEFAULT_GUIDANCE_SCALE
    asked = Asked(
        prompt=list(prompts or (PROMPT,)) if text_conditions(manifest) else None,
        class_labels=list(labels or (LABEL,)) if class_condition(manifest) is not None else None,
        guidance_scale=scale,
        conditions=pictures or None,
        image_latents=None if plan.image_slot is None else np.zeros((1, *manifest.latent.shape), np.float32),
        output_type="latent",
    )
    request = check_request(manifest, asked)
    halves = Pipeline(Bundle(bundle.path, manifest), backend, lazy=True).conditions(request, seed)
    for name, pair in halves.items():
        rows = [np.repeat(half, manifest.batch, 0) if len(half) == 1 else half for half in pair if half is not None]
        made[name] = np.concatenate(rows)
    noise = loop_noise(seed, shape, plan.noises, picture=plan.image_slot is not None)
    return Given(noise.latents, tuple(noise.draws), noise.picture, made, request.guidance_scale)
