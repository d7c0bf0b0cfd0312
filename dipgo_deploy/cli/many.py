"""``dipgo-run --prompts``: a file of prompts, one picture or video a row, each in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo_deploy.cli.outputs import check_kind, write_output
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.prompt_rows import Job, batches, jobs_of, read_rows, shard
from dipgo_deploy.runtime.requests import Asked, check_request
from dipgo_deploy.runtime.row_calls import call_arguments, row_parameters

if TYPE_CHECKING:
    from dipgo_deploy.runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Plan:
    """What is to be drawn. jobs: without what is there already, which ``skipped`` counts."""

    folder: Path
    jobs: tuple[Job, ...]
    skipped: int


def planned(
    file: Path, folder: Path, pattern: str, seed: int, part: str | None, *, video: bool, overwrite: bool
) -> Plan:
    """The rows of a file that are to be drawn into ``folder``.

    Raises:
        UserError: a file, a pattern or a part that is wrong, or a folder that is a file; nothing is written.
    """
    jobs = shard(jobs_of(read_rows(file), folder, pattern, seed), part)
    for suffix in {job.path.suffix for job in jobs}:
        check_kind(Path(f"--name-pattern{suffix}"), "pil", video=video)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file; give a folder for the pictures")
    left = tuple(job for job in jobs if overwrite or not job.path.exists())
    return Plan(folder, left, len(jobs) - len(left))


def draw(
    pipeline: Pipeline,
    plan: Plan,
    usual: Mapping[str, Any],
    *,
    fps: int,
    parameters: bool,
    done: Callable[[int], None],
) -> None:
    """Draw every row into its file, in calls of as many pictures as the engine directory takes at once.

    A picture is the one that its row gives alone. usual: arguments of the pipeline where a row has none. done: told the
    number of pictures after each call. parameters: write what a picture was made with into its file.

    Raises:
        UserError: a row that the engine directory does not take, found before anything is drawn; or a run that failed.
    """
    manifest = pipeline.bundle.manifest
    calls = [(batch, call_arguments([job.row for job in batch], usual)) for batch in batches(plan.jobs, manifest.batch)]
    for batch, arguments in calls:
        try:
            check_request(manifest, Asked(**arguments))
        except UserError as error:
            raise UserError(f"--prompts: row {batch[0].index} (or one drawn with it): {error}") from None
    if plan.jobs:
        plan.folder.mkdir(parents=True, exist_ok=True)
    for batch, arguments in calls:
        result = pipeline(**arguments, seed=[job.seed for job in batch])
        pictures = result.videos if result.frames is not None else [[image] for image in result.images]
        for job, picture in zip(batch, pictures, strict=True):
            text = row_parameters(manifest, job.row, job.seed, usual, result.latents.shape, pipeline.loras)
            images: Any = [picture] if result.frames is not None else picture
            write_output(job.path, images, fps, text if parameters else None)
        done(len(batch))
