"""``dipgo-run --prompts``: a file of prompts, one picture or video a row, each in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo_deploy.cli.outputs import check_kind, write_output
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.parameters import parameters_text
from dipgo_deploy.runtime.prompt_rows import Job, batches, jobs_of, read_rows, shard
from dipgo_deploy.runtime.requests import Asked, check_request

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
    calls = [(batch, _arguments(batch, usual)) for batch in batches(plan.jobs, manifest.batch)]
    for batch, arguments in calls:
        try:
            check_request(manifest, Asked(**arguments))
        except UserError as error:
            raise UserError(f"--prompts: row {batch[0].index} (or one drawn with it): {error}") from None
    if plan.jobs:
        plan.folder.mkdir(parents=True, exist_ok=True)
    scale = manifest.latent.scale or 1
    for batch, arguments in calls:
        result = pipeline(**arguments, seed=[job.seed for job in batch])
        pictures = result.videos if result.frames is not None else [[image] for image in result.images]
        for job, picture in zip(batch, pictures, strict=True):
            row = job.row
            text = parameters_text(
                manifest,
                prompts=() if row.prompt is None else (row.prompt,),
                negative_prompts=(_of(row.negative_prompt, usual.get("negative_prompt")) or "",),
                class_labels=() if row.class_label is None else (row.class_label,),
                seeds=(job.seed,),
                guidance_scale=arguments["guidance_scale"],
                size=(result.latents.shape[-1] * scale, result.latents.shape[-2] * scale),
                loras=pipeline.loras,
            )
            images: Any = [picture] if result.frames is not None else picture
            write_output(job.path, images, fps, text if parameters else None)
        done(len(batch))


def _arguments(batch: Sequence[Job], usual: Mapping[str, Any]) -> dict[str, Any]:
    """What the pipeline is called with for rows of the same settings."""
    rows = [job.row for job in batch]
    first = rows[0]
    found = {
        **usual,
        "guidance_scale": _of(first.guidance_scale, usual.get("guidance_scale")),
        "height": _of(first.height, usual.get("height")),
        "width": _of(first.width, usual.get("width")),
        "prompt": None,
        "class_labels": None,
    }
    if any(row.prompt is not None for row in rows):
        found["prompt"] = [row.prompt or "" for row in rows]
    if any(row.class_label is not None for row in rows):
        found["class_labels"] = [_label(row.class_label) for row in rows]
    negative = [_of(row.negative_prompt, usual.get("negative_prompt")) for row in rows]
    found["negative_prompt"] = [text or "" for text in negative] if any(text is not None for text in negative) else None
    return found


def _label(value: int | str | None) -> int | str:
    """A name, or the number of a class; a table has numbers as text."""
    if value is None:
        raise UserError("--prompts: rows with a class label and rows without; give each one")
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 20 else value


def _of(own: Any, usual: Any) -> Any:
    return usual if own is None else own
