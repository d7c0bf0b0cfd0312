"""An engine directory that was opened for reading."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from dipgo_deploy import arguments
from dipgo_deploy.bundle.files import sha256_file
from dipgo_deploy.bundle.manifest import MANIFEST_NAME, Manifest
from dipgo_deploy.bundle.shapes import Sizes
from dipgo_deploy.bundle.structure import check_structure
from dipgo_deploy.bundle.verification import check_files
from dipgo_deploy.errors import UserError
from dipgo_deploy.files import write_atomic
from dipgo_deploy.schedule.document import Schedule


@dataclass(frozen=True)
class Bundle:
    """An engine directory: its path, and the manifest of one of its schedules.

    Attributes:
        generation: device and inode of ``manifest.json`` when it was opened.
        schedules: names of all its schedules, the usual one first; empty where there is one, which has no name.
    """

    path: Path
    manifest: Manifest
    generation: tuple[int, int] | None = field(default=None, compare=False)
    schedules: tuple[str, ...] = ()

    @classmethod
    def open(
        cls,
        engine_dir: str | os.PathLike[str],
        *,
        schedule: str | None = None,
        launches: int | None = None,
        verify: bool = False,
    ) -> Bundle:
        """Open an engine directory.

        The manifest's seal, its launch list, the schedule and the files' sha256 are checked; those of a large directory
        once, see ``verification``.

        Args:
            engine_dir: the directory.
            schedule: of a directory with several the name of one; None: the first.
            launches: or the schedule that has launches at so many evaluations.
            verify: hash all files now.

        Raises:
            UserError: not an engine directory, a file that is missing or was changed, a launch list that cannot be
                right, or a schedule that it does not have.
        """
        path = arguments.path("engine_dir", engine_dir)
        arguments.flag("verify", verify)
        generation = _generation(path)
        first = Manifest.load(path)
        check_listed(path, first)
        check_structure(first)
        check_files(path, first.files, verify=verify)
        manifest = chosen_manifest(path, first, schedule, launches)
        if manifest is not first:
            check_structure(manifest)
        bundle = cls(path, manifest, generation, names_of(first))
        bundle.check_unchanged()
        return bundle

    def with_each(self) -> Iterator[Bundle]:
        """The directory with each of its schedules, the usual one first; raises UserError as ``open`` does."""
        if not self.schedules:
            yield self
            return
        for manifest in manifests_of(self.path, Manifest.load(self.path)):
            check_structure(manifest)
            yield replace(self, manifest=manifest)

    def check_unchanged(self) -> None:
        """Refuse (UserError) to go on with a directory that was replaced since it was opened: graphs that are loaded
        later would be those of another export."""
        if self.generation is not None and _generation(self.path) != self.generation:
            raise UserError(f"{self.path}: was replaced while it was in use; open it again")

    def at(self, sizes: Sizes) -> Bundle:
        """The directory at one choice of its sizes; raises UserError for one that it does not take."""
        return replace(self, manifest=self.manifest.at(sizes))

    def load_schedule(self) -> Schedule:
        """The schedule that was exported (after promotion)."""
        if self.manifest.schedule not in self.manifest.files:
            raise UserError(f"{self.path}: schedule {self.manifest.schedule!r} is not among the manifest's files")
        return Schedule.load(self.path / self.manifest.schedule)


def names_of(first: Manifest) -> tuple[str, ...]:
    """Names of all schedules of a directory, that of ``manifest.json`` first; empty where there is one."""
    return (first.name, *first.others) if first.others else ()


def manifests_of(engine_dir: Path, first: Manifest) -> Iterator[Manifest]:
    """The manifest of each schedule, ``first``, that of ``manifest.json``, first; raises UserError as ``Bundle.open``
    does."""
    yield first
    for name, file in first.others.items():
        found = Manifest.load(engine_dir, file=file)
        differs = sorted(path for path, digest in found.files.items() if first.files.get(path) != digest)
        if found.name != name or found.others or differs:
            what = f"lists {differs[0]!r} with another sha256" if differs else f"is not of the schedule {name!r} alone"
            raise UserError(f"{engine_dir / file}: {what}; export the engine directory again")
        check_listed(engine_dir, found)
        yield found


def chosen_manifest(engine_dir: Path, first: Manifest, schedule: str | None, launches: int | None = None) -> Manifest:
    """The manifest of a schedule by its name or by its number of evaluations with launches; ``first`` without either.

    Raises:
        UserError: both are given, or there is none or more than one like that.
    """
    if schedule is None and launches is None:
        return first
    if schedule is not None and launches is not None:
        raise UserError("--schedule and --launches: give one of the two")
    every = list(manifests_of(engine_dir, first))
    found = [one for one in every if (one.name == schedule if launches is None else len(one.plan.launched) == launches)]
    if len(found) == 1:
        return found[0]
    offered = ", ".join(f"{one.name or 'its only one'} ({len(one.plan.launched)} launches)" for one in every)
    asked = f"schedule {schedule}" if launches is None else f"schedule of {launches} launches"
    many = "more than one " if found else "no "
    raise UserError(f"{engine_dir}: has {many}{asked}; it has {offered}")


def _generation(engine_dir: Path) -> tuple[int, int] | None:
    try:
        found = (engine_dir / MANIFEST_NAME).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def check_listed(engine_dir: Path, manifest: Manifest) -> None:
    """Refuse (UserError) files outside the directory, and graphs or tokenizers without a digest."""
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{engine_dir}: files: {name!r} is outside the engine directory; do not use this directory")
    for name in manifest.others.values():
        if name not in manifest.files:
            raise UserError(f"{engine_dir}: {name!r} is not among the manifest's files; export the directory again")
    for name in manifest.graph_files():
        if name not in manifest.files:
            raise UserError(f"{engine_dir}: {name!r} is not among the manifest's files; export the directory again")


def reseal(engine_dir: str | os.PathLike[str]) -> Bundle:
    """Seal an engine directory whose files or manifest were changed on purpose, and open it.

    The digests of the files that its manifests list, and their seals, are made anew; the launch lists are checked
    first.

    Raises:
        UserError: the manifest cannot be read or its launch list cannot be right, or a file is missing.
    """
    path = arguments.path("engine_dir", engine_dir)
    first = Manifest.load(path, sealed=False)
    for file in (*first.others.values(), MANIFEST_NAME):  # the first last: it has the digests of the others
        manifest = Manifest.load(path, file=file, sealed=False)
        check_listed(path, manifest)
        check_structure(manifest)
        missing = next((name for name in manifest.files if not (path / name).is_file()), None)
        if missing is not None:
            raise UserError(f"{path / missing}: missing; the directory cannot be sealed")
        files = {name: sha256_file(path / name) for name in manifest.files}
        write_atomic(path / file, manifest.model_copy(update={"files": files}).dumps().encode())
    return Bundle.open(path)
