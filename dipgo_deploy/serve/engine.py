"""An engine directory as a server has it: which schedules it offers, whether a request fits, and drawing a batch."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.given_pictures import picture_conditions
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.runtime.prompt_rows import PromptRow
from dipgo_deploy.runtime.requests import Asked, check_request
from dipgo_deploy.runtime.row_calls import call_arguments, row_parameters
from dipgo_deploy.serve.schemas import SEEDS, GenerationRequest

if TYPE_CHECKING:
    from PIL.Image import Image

    from dipgo_deploy.serve.settings import Settings


@dataclass(frozen=True)
class Wanted:
    """One picture. schedule: by name, "" of a directory with one."""

    row: PromptRow
    seed: int
    schedule: str
    guidance_scale_2: float | None = None

    @property
    def key(self) -> Hashable:
        """What pictures have in common that are drawn together."""
        return self.schedule, self.guidance_scale_2, self.row.settings


@dataclass(frozen=True)
class Drawn:
    """A picture, and the text that its file carries."""

    image: Image
    parameters: str


class Engine:
    """An engine directory with a pipeline for each of its schedules; they share what they have in common."""

    def __init__(self, name: str, pipeline: Pipeline) -> None:
        self.name = name
        self._first = pipeline
        self._pipelines = {pipeline.bundle.manifest.name: pipeline}
        for schedule in pipeline.bundle.schedules[1:]:
            self._pipelines[schedule] = pipeline.with_schedule(schedule)
        for manifest in self.manifests.values():
            check_served(pipeline.bundle.path, manifest)

    @property
    def manifests(self) -> dict[str, Manifest]:
        """By schedule, the usual one first."""
        return {name: pipeline.bundle.manifest for name, pipeline in self._pipelines.items()}

    @property
    def batch(self) -> int:
        """Pictures at a time."""
        return self._first.bundle.manifest.batch

    def schedule(self, name: str | None, launches: int | None) -> str:
        """Name of the schedule that a request asks for; the usual one without either. Raises UserError for another."""
        if name is not None and launches is not None:
            raise UserError("schedule and launches: give one of the two")
        counts = {one: len(manifest.plan.launched) for one, manifest in self.manifests.items()}
        if name is None and launches is None:
            return next(iter(counts))
        found = [one for one, count in counts.items() if (one == name if launches is None else count == launches)]
        if len(found) != 1:
            asked = f"schedule {name!r}" if launches is None else f"launches {launches}"
            offered = ", ".join(f"{one or 'its only one'} ({count} launches)" for one, count in counts.items())
            raise UserError(f"{asked}: {'more than one' if found else 'none'} of {self.name} is that; it has {offered}")
        return found[0]

    def wanted(self, asked: GenerationRequest) -> list[Wanted]:
        """The pictures of a request. Raises UserError for what this directory does not draw, before anything waits."""
        schedule = self.schedule(asked.schedule, asked.launches)
        pipeline = self._pipelines[schedule]
        width, height = asked.pixels
        row = PromptRow(
            prompt=asked.prompt,
            negative_prompt=asked.negative_prompt,
            class_label=asked.class_label,
            guidance_scale=asked.guidance_scale,
            height=height,
            width=width,
        )
        seed = secrets.randbelow(SEEDS) if asked.seed is None else asked.seed
        found = [Wanted(row, (seed + place) % SEEDS, schedule, asked.guidance_scale_2) for place in range(asked.n)]
        pipeline.check_steps(asked.num_inference_steps)
        check_request(pipeline.bundle.manifest, Asked(**call_arguments([row], _usual(found[0]))))
        return found

    def load(self) -> None:
        """Load what all schedules need. Raises UserError as ``Pipeline.load``."""
        for pipeline in self._pipelines.values():
            pipeline.load()

    def close(self) -> None:
        """Let go of all that is loaded."""
        self._first.close()

    def draw(self, batch: Sequence[Wanted], check: Callable[[], None]) -> list[Drawn]:
        """The pictures of a batch with one ``key``, each the one that it is alone.

        check: called after every launch; what it raises ends the run.

        Raises:
            NotFiniteError: one of them has no picture.
            UserError: the backend failed.
        """
        pipeline, usual = self._pipelines[batch[0].schedule], _usual(batch[0])
        arguments = call_arguments([wanted.row for wanted in batch], usual)
        seeds = [wanted.seed for wanted in batch]
        result = pipeline(**arguments, seed=seeds, callback=lambda done, total: check())
        return [
            Drawn(
                image,
                row_parameters(
                    pipeline.bundle.manifest, wanted.row, wanted.seed, usual, result.latents.shape, pipeline.loras
                ),
            )
            for wanted, image in zip(batch, result.images, strict=True)
        ]


def _usual(wanted: Wanted) -> dict[str, float | None]:
    return {"guidance_scale_2": wanted.guidance_scale_2}


def check_served(path: Path, manifest: Manifest) -> None:
    """Refuse (UserError) a directory that gives no pictures."""
    if manifest.latent.frames is not None:
        raise UserError(f"{path}: makes videos, and the server gives pictures; use dipgo-run")
    if manifest.components.vae_decoder is None:
        raise UserError(f"{path}: has no VAE decoder; export it with one to get pictures")
    if manifest.sampler.strength is not None or picture_conditions(manifest):
        raise UserError(f"{path}: draws after pictures, which a request cannot give; use dipgo-run")


def open_engines(settings: Settings) -> list[Engine]:
    """Open all directories; nothing is loaded yet.

    Raises:
        UserError: one that cannot be opened or drawn from here, or two of one name.
    """
    engines: dict[str, Engine] = {}
    for text in settings.directories:
        given, equals, path = text.partition("=")
        if not equals:
            given, path = Path(text).resolve().name, text
        if not given or len(given) > 100 or not given.isprintable() or set(":/") & set(given):
            raise UserError(f"{text}: {given!r} cannot be the name of a model; give NAME=DIR")
        if given in engines:
            raise UserError(f"{text}: another directory is {given!r} already; give NAME=DIR with another name")
        pipeline = Pipeline.from_engine_dir(
            path, settings.backend, threads=settings.threads, verify=settings.verify, load="call"
        )
        engines[given] = Engine(given, pipeline)
    return list(engines.values())
