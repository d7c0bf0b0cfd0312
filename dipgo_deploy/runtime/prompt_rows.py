"""A file of prompts: one picture a row, each with settings of its own where it has some."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from dipgo_deploy import documents
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import read_bytes
from dipgo_deploy.schedule.validation import one_line

MOST_ROWS = 1_000_000


class PromptRow(pydantic.BaseModel):
    """One picture. What is None is as the command says; the seed then counts up from the command's."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    prompt: str | None = None
    negative_prompt: str | None = None
    class_label: int | str | None = None
    seed: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    name: str | None = pydantic.Field(default=None, description="of the file, for `{name}` of the pattern")

    @property
    def settings(self) -> tuple[object, ...]:
        """What rows have to have in common to be drawn in one call."""
        # A pipeline takes none of these for some pictures of a call alone, and none is not always the empty text.
        given = self.prompt is None, self.negative_prompt is None, self.class_label is None
        return self.guidance_scale, self.height, self.width, *given


@dataclass(frozen=True)
class Job:
    """A row with its place in the file, its seed and the file that it is drawn to."""

    index: int
    row: PromptRow
    seed: int
    path: Path


def read_rows(path: Path) -> list[PromptRow]:
    """The rows of a file: ``.txt``, a prompt a line; ``.csv`` with a line of names; ``.jsonl``, an object a line. Blank
    lines do not count.

    Raises:
        UserError: it cannot be read, is of another kind, has a row that is wrong, or none.
    """
    readers = {".txt": _text, ".csv": _csv, ".jsonl": _jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"--prompts {path}: give a file in {', '.join(readers)}")
    try:
        text = read_bytes(path, what="file of prompts").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path}: byte {error.start} is not UTF-8 text") from None
    rows: list[PromptRow] = []
    try:
        for line, values in reader(text):
            if len(rows) == MOST_ROWS:
                raise UserError(f"more than {MOST_ROWS} rows; split the file")
            try:
                rows.append(PromptRow.model_validate(values))
            except pydantic.ValidationError as error:
                raise UserError(f"line {line}: {one_line(error)}") from None
    except (UserError, csv.Error) as error:
        raise UserError(f"--prompts {path}: {error}") from None
    if not rows:
        raise UserError(f"--prompts {path}: has no row")
    return rows


def _text(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _csv(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    for values in reader:
        if None in values:
            raise UserError(f"line {reader.line_num}: has more fields than the first line")
        yield reader.line_num, {name.strip(): value for name, value in values.items() if value}


def _jsonl(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, documents.json_object(line)
            except UserError as error:
                raise UserError(f"line {number}: {error}") from None


def jobs_of(rows: Sequence[PromptRow], folder: Path, pattern: str, seed: int) -> list[Job]:
    """Every row with its seed and file. pattern: of the file's name, with ``{index}``, ``{seed}`` and ``{name}``.

    Raises:
        UserError: a pattern that is none, one that leads out of the folder, or two rows of one file.
    """
    found: dict[Path, Job] = {}
    for index, row in enumerate(rows):
        own = seed + index if row.seed is None else row.seed
        try:
            name = pattern.format(index=index, seed=own, name=row.name if row.name is not None else f"{index:05d}")
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise UserError(
                f"--name-pattern {pattern}: {error}; it knows {{index}}, {{seed}} and {{name}}, as in {{index:05d}}.png"
            ) from None
        path = folder / name
        if Path(name).name != name or name in (".", ".."):
            raise UserError(f"--name-pattern {pattern}: row {index} would be {name!r}, which is no name of a file")
        if path in found:
            raise UserError(f"--name-pattern {pattern}: rows {found[path].index} and {index} would both be {name}")
        found[path] = Job(index, row, own, path)
    return list(found.values())


def shard(jobs: Sequence[Job], text: str | None) -> list[Job]:
    """Every n-th job from the i-th on, of ``i/n`` with i from 1; all without. Raises UserError for another text."""
    if text is None:
        return list(jobs)
    first, slash, count = text.partition("/")
    if not (slash and first.isdecimal() and count.isdecimal() and len(text) < 20 and 1 <= int(first) <= int(count)):
        raise UserError(f"--shard {text}: give i/n, such as 2/4: the second of four parts")
    return [job for job in jobs if job.index % int(count) == int(first) - 1]


def batches(jobs: Iterable[Job], most: int) -> list[tuple[Job, ...]]:
    """The jobs that are drawn together: at most ``most`` of the same settings, in the order of the file, and by their
    first one.

    A picture's last digit can depend on what is drawn beside it. So a run that goes on, or a call that is made again,
    has to put together what was together before.
    """
    alike: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        alike.setdefault(job.row.settings, []).append(job)
    found = [tuple(same[start : start + most]) for same in alike.values() for start in range(0, len(same), most)]
    return sorted(found, key=lambda call: call[0].index)
