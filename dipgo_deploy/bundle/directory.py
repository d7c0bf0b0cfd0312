"""An engine directory that was opened for reading."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dipgo_deploy import arguments
from dipgo_deploy.bundle.files import sha256_file
from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.bundle.shapes import Sizes
from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.document import Schedule


@dataclass(frozen=True)
class Bundle:
    """An engine directory: its path and manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, engine_dir: str | os.PathLike[str], *, verify: bool = False) -> Bundle:
        """Open an engine directory.

        All files the manifest lists must be there, and every graph it names must be listed; with ``verify`` their
        sha256 is checked too.

        Raises:
            UserError: not an engine directory, a missing file, or (with ``verify``) a file that was changed.
        """
        path = arguments.path("engine_dir", engine_dir)
        arguments.flag("verify", verify)
        manifest = Manifest.load(path)
        for name, digest in manifest.files.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UserError(f"{path}: files: {name!r} is outside the engine directory; do not use this directory")
            file = path / name
            if not file.is_file():
                raise UserError(f"{file}: missing; copy the engine directory again or export it again")
            if verify and sha256_file(file) != digest:
                raise UserError(f"{file}: its sha256 differs from the manifest's; export the engine directory again")
        for name in manifest.graph_files():
            if name not in manifest.files:
                raise UserError(f"{path}: graph {name!r} is not among the manifest's files; export the directory again")
        return cls(path, manifest)

    def at(self, sizes: Sizes) -> Bundle:
        """The directory at one choice of its sizes; raises UserError for one that it does not take."""
        return Bundle(self.path, self.manifest.at(sizes))

    def load_schedule(self) -> Schedule:
        """The schedule that was exported (after promotion)."""
        if self.manifest.schedule not in self.manifest.files:
            raise UserError(f"{self.path}: schedule {self.manifest.schedule!r} is not among the manifest's files")
        return Schedule.load(self.path / self.manifest.schedule)
