"""An engine directory as a server has it: which schedules it offers, whether a request fits, and drawing a batch."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.bundle.pictures import ARGUMENTS
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.picture_file import read_picture
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.runtime.prompt_rows import PromptRow
from dipgo_deploy.runtime.requests import Asked, check_request
from dipgo_deploy.runtime.row_calls import call_arguments, row_parameters
from dipgo_deploy.serve.schemas import MOST_PIXELS, SEEDS, GenerationRequest

if TYPE_CHECKING:
    from PIL.Image import Image

    from dipgo_deploy.serve.settings import Settings


@dataclass(frozen=True, eq=False)
class Given:
    """What all pictures of a request have besides their rows.

    Attributes:
        scalars: arguments of the pipeline that are numbers.
        pictures: those that are pictures; of ``control_image`` a list where several were given.
    """

    scalars: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Image | list[Image]] = field(default_factory=dict)

    @property
    def key(self) -> Hashable:
        """What pictures have in common that are drawn together: numbers that are the same, or the request itself."""
        return self if self.pictures else tuple(self.scalars.items())

    def arguments(self, count: int) -> dict[str, Any]:
        """Arguments of the pipeline for so many pictures; each has the given ones for itself."""
        found: dict[str, Any] = dict(self.scalars)
        for name, given in self.pictures.items():
            found[name] = [[one] * count for one in given] if isinstance(given, list) else [given] * count
        return found


@dataclass(frozen=True)
class Wanted:
    """One picture. schedule: by name, "" of a directory with one."""

    row: PromptRow
    seed: int
    schedule: str
    given: Given

    @property
    def key(self) -> Hashable:
        """What pictures have in common that are drawn together."""
        return self.schedule, self.given.key, self.row.settings


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
        pipeline.check_steps(asked.num_inference_steps)
        given = _given(asked)
        check_request(pipeline.bundle.manifest, Asked(**call_arguments([row], given.arguments(1))))
        return [Wanted(row, (seed + place) % SEEDS, schedule, given) for place in range(asked.n)]

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
        pipeline, usual = self._pipelines[batch[0].schedule], batch[0].given.arguments(len(batch))
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


_SCALARS = ("guidance_scale_2", "control_scale", "ip_adapter_scale", "strength")


def _given(asked: GenerationRequest) -> Given:
    """Raises UserError for what is no picture."""
    scalars = {name: getattr(asked, name) for name in _SCALARS}
    scalars = {name: tuple(value) if isinstance(value, list) else value for name, value in scalars.items()}
    pictures: dict[str, Image | list[Image]] = {}
    for name in ARGUMENTS:
        text = getattr(asked, name)
        if isinstance(text, list):
            pictures[name] = [_picture(name, one) for one in text]
        elif text is not None:
            pictures[name] = _picture(name, text)
    return Given(scalars, pictures)


def _picture(name: str, text: str) -> Image:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise UserError(f"{name}: not base64; give a picture's file in it, without a prefix") from None
    return read_picture(name, data, MOST_PIXELS)


def check_served(path: Path, manifest: Manifest) -> None:
    """Refuse (UserError) a directory that gives no pictures."""
    if manifest.latent.frames is not None:
        raise UserError(f"{path}: makes videos, and the server gives pictures; use dipgo-run")
    if manifest.components.vae_decoder is None:
        raise UserError(f"{path}: has no VAE decoder; export it with one to get pictures")


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
