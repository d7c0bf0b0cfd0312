"""An engine directory that was opened for reading."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
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
    """An engine directory: its path and manifest. generation: device and inode of the manifest when it was opened."""

    path: Path
    manifest: Manifest
    generation: tuple[int, int] | None = field(default=None, compare=False)

    @classmethod
    def open(cls, engine_dir: str | os.PathLike[str], *, verify: bool = False) -> Bundle:
        """Open an engine directory.

        The manifest's seal, its launch list, the schedule and the files' sha256 are checked; those of a large directory
        once, see ``verification``.

        verify: hash all files now.

        Raises:
            UserError: not an engine directory, a file that is missing or was changed, or a launch list that cannot be
                right.
        """
        path = arguments.path("engine_dir", engine_dir)
        arguments.flag("verify", verify)
        generation = _generation(path)
        manifest = Manifest.load(path)
        check_listed(path, manifest)
        check_structure(manifest)
        check_files(path, manifest.files, verify=verify)
        bundle = cls(path, manifest, generation)
        bundle.check_unchanged()
        return bundle

    def check_unchanged(self) -> None:
        """Refuse (UserError) to go on with a directory that was replaced since it was opened: graphs that are loaded
        later would be those of another export."""
        if self.generation is not None and _generation(self.path) != self.generation:
            raise UserError(f"{self.path}: was replaced while it was in use; open it again")

    def at(self, sizes: Sizes) -> Bundle:
        """The directory at one choice of its sizes; raises UserError for one that it does not take."""
        return Bundle(self.path, self.manifest.at(sizes), self.generation)

    def load_schedule(self) -> Schedule:
        """The schedule that was exported (after promotion)."""
        if self.manifest.schedule not in self.manifest.files:
            raise UserError(f"{self.path}: schedule {self.manifest.schedule!r} is not among the manifest's files")
        return Schedule.load(self.path / self.manifest.schedule)


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
    for name in manifest.graph_files():
        if name not in manifest.files:
            raise UserError(f"{engine_dir}: {name!r} is not among the manifest's files; export the directory again")


def reseal(engine_dir: str | os.PathLike[str]) -> Bundle:
    """Seal an engine directory whose files or manifest were changed on purpose, and open it.

    The digests of the files that the manifest lists, and its seal, are made anew; the launch list is checked first.

    Raises:
        UserError: the manifest cannot be read or its launch list cannot be right, or a file is missing.
    """
    path = arguments.path("engine_dir", engine_dir)
    manifest = Manifest.load(path, sealed=False)
    check_listed(path, manifest)
    check_structure(manifest)
    missing = next((name for name in manifest.files if not (path / name).is_file()), None)
    if missing is not None:
        raise UserError(f"{path / missing}: missing; the directory cannot be sealed")
    files = {name: sha256_file(path / name) for name in manifest.files}
    write_atomic(path / MANIFEST_NAME, manifest.model_copy(update={"files": files}).dumps().encode())
    return Bundle.open(path)
