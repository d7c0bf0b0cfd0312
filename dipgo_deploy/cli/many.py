"""``dipgo-run --prompts``: a file of prompts, one picture or video a row, each in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo_deploy.cli.outputs import check_kind, write_output
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.prompt_rows import Job, batches, jobs_of, read_rows, shard
from dipgo_deploy.runtime.requests import Asked, check_request
from dipgo_deploy.runtime.row_calls import call_arguments, row_parameters

if TYPE_CHECKING:
    from dipgo_deploy.bundle.manifest import Manifest
    from dipgo_deploy.runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Plan:
    """What is to be drawn.

    Attributes:
        folder: of the files.
        calls: rows that are drawn together, wherever a file of one is missing.
        left: number of files that are to be written.
        skipped: number of files that are there already.
        overwrite: whether those are written too.
    """

    folder: Path
    calls: tuple[tuple[Job, ...], ...]
    left: int
    skipped: int
    overwrite: bool


@dataclass(frozen=True)
class Drawing:
    """How every row is drawn.

    Attributes:
        usual: arguments of the pipeline where a row has none.
        fps: frames a second of videos.
        parameters: write what a picture was made with into its file.
        overwrite: draw what is there already.
    """

    usual: Mapping[str, Any]
    fps: int
    parameters: bool
    overwrite: bool


def planned(
    file: Path, folder: Path, pattern: str, seed: int, part: str | None, *, batch: int, video: bool, overwrite: bool
) -> Plan:
    """The rows of a file that are to be drawn into ``folder``, at most ``batch`` together.

    Raises:
        UserError: a file, a pattern or a part that is wrong, or a folder that is a file; nothing is written.
    """
    jobs = shard(jobs_of(read_rows(file), folder, pattern, seed), part)
    for suffix in {job.path.suffix for job in jobs}:
        check_kind(Path(f"--name-pattern{suffix}"), "pil", video=video)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file; give a folder for the pictures")
    calls = batches(jobs, batch)
    counts = [len(missing(call, overwrite=overwrite)) for call in calls]
    kept = tuple(call for call, count in zip(calls, counts, strict=True) if count)
    return Plan(folder, kept, sum(counts), len(jobs) - sum(counts), overwrite)


def missing(call: Sequence[Job], *, overwrite: bool) -> list[Job]:
    """Those of a call whose file is to be written."""
    return [job for job in call if overwrite or not job.path.exists()]


def check_rows(manifest: Manifest, plan: Plan, drawing: Drawing) -> None:
    """Refuse (UserError) a row that the engine directory does not take."""
    for call in plan.calls:
        try:
            check_request(manifest, Asked(**call_arguments([job.row for job in call], drawing.usual)))
        except UserError as error:
            raise UserError(f"--prompts: row {call[0].index} (or one drawn with it): {error}") from None


def draw(pipeline: Pipeline, plan: Plan, drawing: Drawing, done: Callable[[int], None]) -> None:
    """Draw every row into its file, in calls of as many pictures as the engine directory takes at once.

    A picture is the one that its row gives alone. done: told the number of files after each call.

    Raises:
        UserError: a row that the engine directory does not take, found before anything is drawn; or a run that failed.
    """
    check_rows(pipeline.bundle.manifest, plan, drawing)
    if plan.calls:
        plan.folder.mkdir(parents=True, exist_ok=True)
    for call in plan.calls:
        done(draw_call(pipeline, call, drawing))


def draw_call(pipeline: Pipeline, call: Sequence[Job], drawing: Drawing) -> int:
    """Draw rows together, and write the files of those that are missing; their number. Raises UserError where a file
    cannot be written, and what the pipeline raises."""
    left = missing(call, overwrite=drawing.overwrite)
    if not left:
        return 0
    manifest = pipeline.bundle.manifest
    result = pipeline(**call_arguments([job.row for job in call], drawing.usual), seed=[job.seed for job in call])
    pictures = result.videos if result.frames is not None else [[image] for image in result.images]
    for job, picture in zip(call, pictures, strict=True):
        if job not in left:
            continue
        text = row_parameters(manifest, job.row, job.seed, drawing.usual, result.latents.shape, pipeline.loras)
        images: Any = [picture] if result.frames is not None else picture
        write_output(job.path, images, drawing.fps, text if drawing.parameters else None)
    return len(left)
